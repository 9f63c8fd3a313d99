"""One device's half of an adapter while it trains: its parameters, its optimiser and what it has learnt since."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch.optim.lr_scheduler import LambdaLR

from sfl.adapters.state import AdapterState, difference, require_same_keys, total
from sfl.model.lora import AdapterSlots
from sfl.wire.split import OptimizerSpec


class LocalAdapter:
    """Parameters that stem from global version `version`, trained apart from it until the next one is adopted.

    The device and the edge each hold one for their half, with the same optimiser settings: AdamW and SGD treat every
    parameter by itself, so two halves step exactly as one whole would.
    The anchor is where the part of training begins that no submission holds yet: progress = values - anchor. It begins as the
    very arrays of `state`, which nobody may change afterwards: an edge has them once for all devices of one version.
    Raises `AdapterError` when `state` is not this half's part of an adapter at `cut`.
    """

    def __init__(self, slots: AdapterSlots, state: AdapterState, cut: int, version: int, optimizer: OptimizerSpec) -> None:
        self.version = version
        self._slots = slots
        self._parameters = slots.parameters_for(state, cut)
        self._optimizer = _make_optimizer(list(self._parameters.values()), optimizer)
        decay_steps = optimizer.decay_steps
        self._schedule = LambdaLR(self._optimizer, lambda done: max(0.0, 1 - done / decay_steps) if decay_steps else 1.0)
        self._anchor = dict(state)

    def mount(self) -> None:
        """Make the half that all share compute with this adapter; gradients that a failed step left are dropped."""
        self._optimizer.zero_grad(set_to_none=True)
        self._slots.mount(self._parameters)

    def values(self) -> AdapterState:
        """Copies of the present values, float32."""
        return self._slots.read(self._parameters)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What this holds in memory now: `adapter` (the parameters and the anchor), `gradients` and `optimiser` (its state)."""
        parameters = list(self._parameters.values())
        state = [value for entry in self._optimizer.state.values() for value in entry.values()]
        return {
            "adapter": [*parameters, *map(torch.from_numpy, self._anchor.values())],
            "gradients": [parameter.grad for parameter in parameters if parameter.grad is not None],
            "optimiser": [value for value in state if isinstance(value, torch.Tensor)],
        }

    def layer_norms(self) -> dict[int, float]:
        """L2 norm of the gradient of each layer's tensors together, as left by the last backward pass."""
        gradients: dict[int, list[torch.Tensor]] = defaultdict(list)
        for key, parameter in self._parameters.items():
            if parameter.grad is not None:
                gradients[key.layer].append(parameter.grad)
        return {layer: float(torch.nn.utils.get_total_norm(found)) for layer, found in gradients.items()}

    def step(self) -> None:
        """One optimiser step from the gradients, which are cleared."""
        self._optimizer.step()
        self._schedule.step()
        self._optimizer.zero_grad(set_to_none=True)

    def take_progress(self) -> AdapterState:
        """What was learnt since the last call or adoption; the anchor moves here, so that nothing is taken twice."""
        values = self.values()
        progress = difference(values, self._anchor)
        self._anchor = values
        return progress

    def adopt(self, state: AdapterState, version: int, keep_progress: bool) -> None:
        """Go on from a newer global version, plus the progress not taken yet if `keep_progress`. The optimiser's moments stay.

        Raises `AdapterError` when `state` does not have this half's tensors; nothing has changed then.
        """
        require_same_keys(state, self._anchor)
        values = total(state, difference(self.values(), self._anchor)) if keep_progress else state
        with torch.no_grad():
            for key, parameter in self._parameters.items():
                parameter.copy_(torch.from_numpy(values[key]))
        self._anchor = dict(state)
        self.version = version


def _make_optimizer(parameters: list[torch.nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
