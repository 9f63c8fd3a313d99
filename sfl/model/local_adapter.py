"""One device's half of an adapter while it trains: its parameters, its optimiser and what it has learnt since."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from sfl.adapters.state import HEAD, AdapterKey, AdapterState, difference, edge_half, total
from sfl.errors import AdapterError
from sfl.model.frozen_factors import frozen_state
from sfl.model.lora import AdapterSlots
from sfl.state_file import Tensors
from sfl.wire.split import OptimizerSpec, TrainingRules

_AS_EVER = TrainingRules()
_VALUE, _ANCHOR, _ORIGIN, _MOMENT = "value", "anchor", "origin", "moment"  # what the names of a state's tensors begin with


class LocalAdapter:
    """Parameters that stem from global version `version`, trained apart from it until the next one is adopted.

    The device and the edge each hold one for their half, with the same optimiser settings and rules: AdamW and SGD treat
    every parameter by itself, so two halves step exactly as one whole would.
    The anchor is where the part of training begins that no submission holds yet: progress = values - anchor. It begins as the
    very arrays of `state`, which nobody may change afterwards: an edge has them once for all devices of one version.
    Factors that the rules freeze, and frozen factors, are applied as the version has them; they have no part in progress.
    Raises `AdapterError` when `state` is not this half's part of an adapter at `cut` with factors of this `rank` (0: that of
    the LoRA settings).
    """

    def __init__(
        self,
        slots: AdapterSlots,
        state: AdapterState,
        cut: int,
        version: int,
        optimizer: OptimizerSpec,
        rank: int = 0,
        rules: TrainingRules = _AS_EVER,
    ) -> None:
        self.version = version
        self.optimizer = optimizer
        self._slots = slots
        self._cut = cut
        self._rank = rank
        self._rules = rules
        self._all = slots.parameters_for(state, cut, rank)
        self._frozen = slots.frozen_for(state, cut)
        self._parameters = {key: parameter for key, parameter in self._all.items() if self._is_trained(key)}
        for key in self._all.keys() - self._parameters.keys():
            self._all[key].requires_grad_(False)
        self._optimizer = _make_optimizer(list(self._parameters.values()), optimizer)
        self._anchor: AdapterState = {}
        self._origin: dict[AdapterKey, torch.Tensor] = {}
        self._begin_at(state)

    def mount(self) -> None:
        """Make the half that all share compute with this adapter; gradients that a failed step left are dropped."""
        self._optimizer.zero_grad(set_to_none=True)
        self._slots.mount(self._all, self._frozen)

    def values(self) -> AdapterState:
        """Copies of the present values of all that this half applies, float32."""
        return self._slots.read(self._all) | frozen_state(self._frozen)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """What this holds in memory now: `adapter` (what is applied, and the anchor), `gradients` and `optimiser` (its state)."""
        state = [value for entry in self._optimizer.state.values() for value in entry.values()]
        frozen = [factor.weight for pair in self._frozen.values() for factor in pair]
        return {
            "adapter": [*self._all.values(), *frozen, *map(torch.from_numpy, self._anchor.values())],
            "gradients": [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None],
            "optimiser": [value for value in state if isinstance(value, torch.Tensor)],
        }

    def layer_norms(self) -> dict[int, float]:
        """L2 norm of the loss's gradient of each layer's tensors together, as left by the last backward pass."""
        gradients: dict[int, list[torch.Tensor]] = defaultdict(list)
        for key, parameter in self._parameters.items():
            if parameter.grad is not None:
                gradients[key.layer].append(parameter.grad)
        return {layer: float(torch.nn.utils.get_total_norm(found)) for layer, found in gradients.items()}

    def step(self, rate: float) -> None:
        """One optimiser step at this learning rate from the gradients, which are cleared."""
        self._pull_to_version()
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def take_progress(self, first_layer: int = 0) -> AdapterState:
        """What the layers from `first_layer` on have learnt since the last call or adoption; their anchor moves here, so that
        nothing is taken twice."""
        values = {key: value for key, value in self._trained_values().items() if key.layer >= first_layer}
        progress = difference(values, edge_half(self._anchor, first_layer))
        self._anchor = self._anchor | values
        return progress

    def adopt(self, state: AdapterState, version: int, keep_progress: bool) -> None:
        """Go on from a newer global version, plus the progress not taken yet if `keep_progress`.

        The optimiser's moments stay, unless the rules want them fresh. Frozen factors may be of another rank than before.
        Raises `AdapterError` when `state` does not have this half's tensors; nothing has changed then.
        """
        self._slots.require(state, self._cut, self._rank)
        self._frozen = self._slots.frozen_for(state, self._cut)
        values = {key: state[key] for key in self._all}
        if keep_progress:
            values |= total(self._of_trained(state), difference(self._trained_values(), self._anchor))
        with torch.no_grad():
            for key, parameter in self._all.items():
                parameter.copy_(torch.from_numpy(values[key]))
        if self._rules.fresh_optimizer:
            self._optimizer.state.clear()
        self._begin_at(state)
        self.version = version

    def begin(self, state: AdapterState, version: int) -> None:
        """Be what a new adapter at this version is: no progress, and an optimiser that has not stepped yet. Raises as `adopt`."""
        self.adopt(state, version, keep_progress=False)
        self._optimizer.state.clear()

    def state(self) -> Tensors:
        """All that training has made of this, `version` aside, by names from which `restore` takes it; later steps leave it."""
        found: Tensors = {}
        for name, state in ((_VALUE, self.values()), (_ANCHOR, self._anchor)):
            found |= {f"{name}/{key}": value for key, value in state.items()}
        found |= {f"{_ORIGIN}/{key}": origin.cpu().numpy() for key, origin in self._origin.items()}
        for key, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            found |= {f"{_MOMENT}/{name}/{key}": np.array(moment.cpu().numpy()) for name, moment in moments.items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: Tensors, version: int) -> None:
        """Be what the adapter was whose `state` is `tensors`, at this version; it had the same cut, rank and rules.

        Raises `AdapterError` when these are not its tensors; nothing has changed then.
        """
        values, anchor, origin = (_named(tensors, name) for name in (_VALUE, _ANCHOR, _ORIGIN))
        self._slots.require(values, self._cut, self._rank)
        for found, wanted in ((anchor, self._parameters), (origin, self._parameters if self._rules.proximal else {})):
            for key in sorted(found.keys() ^ wanted.keys()):
                raise AdapterError(f"adapter tensor {key} is {'unknown to' if key in found else 'missing from'} a state")
        frozen = self._slots.frozen_for(values, self._cut)
        moments = self._moments_in(tensors)
        self._frozen, self._anchor, self.version = frozen, anchor, version
        for key, parameter in self._all.items():
            parameter.copy_(torch.from_numpy(values[key]))
        self._origin = {key: torch.from_numpy(value).to(self._parameters[key].device) for key, value in origin.items()}
        self._optimizer.state.clear()
        for parameter, kept in moments.items():
            self._optimizer.state[parameter] = kept

    def _moments_in(self, tensors: Tensors) -> dict[torch.nn.Parameter, dict[str, torch.Tensor]]:
        """What the optimiser keeps of each parameter: its moments beside it, its count of steps in CPU memory."""
        found: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, array in tensors.items():
            if name.startswith(f"{_MOMENT}/"):
                _, moment, key = name.split("/", 2)
                parameter = self._parameters.get(AdapterKey.parse(key))
                if parameter is None:
                    raise AdapterError(f"adapter tensor {key} is unknown to a state")
                tensor = torch.from_numpy(np.array(array))
                found[parameter][moment] = tensor.to(parameter.device) if tensor.shape == parameter.shape else tensor
        return dict(found)

    def _begin_at(self, state: AdapterState) -> None:
        """Take the version whose half is `state` as where training begins, and where the proximal term pulls to."""
        self._anchor = self._of_trained(state)
        if self._rules.proximal:
            self._origin = {key: torch.from_numpy(state[key]).to(parameter.device) for key, parameter in self._parameters.items()}

    @torch.no_grad()
    def _pull_to_version(self) -> None:
        """FedProx: add the gradient of mu/2 ||theta - theta_version||^2, for the tensors that this step trains."""
        for key, origin in self._origin.items():
            parameter = self._parameters[key]
            if parameter.grad is not None:
                parameter.grad.add_(parameter - origin, alpha=self._rules.proximal)

    def _trained_values(self) -> AdapterState:
        return self._slots.read(self._parameters)

    def _of_trained(self, state: AdapterState) -> AdapterState:
        return {key: state[key] for key in self._parameters}

    def _is_trained(self, key: AdapterKey) -> bool:
        return key.layer == HEAD or key.part not in self._rules.frozen_parts


def values_in(tensors: Tensors) -> AdapterState:
    """The values in a `LocalAdapter.state`, of which another one can be made before it is restored."""
    return _named(tensors, _VALUE)


def _named(tensors: Tensors, name: str) -> AdapterState:
    return {AdapterKey.parse(key[len(name) + 1 :]): value for key, value in tensors.items() if key.startswith(f"{name}/")}


def _make_optimizer(parameters: list[torch.nn.Parameter], spec: OptimizerSpec) -> torch.optim.Optimizer:
    if spec.name == "sgd":
        return torch.optim.SGD(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
    return torch.optim.AdamW(parameters, lr=spec.learning_rate, weight_decay=spec.weight_decay)
