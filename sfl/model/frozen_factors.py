"""Frozen factors: products that a merge has added to the global model, applied beside LoRA's own and never trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from sfl.adapters.state import FROZEN_A, FROZEN_B, AdapterKey, AdapterState, Array
from sfl.errors import AdapterError

_ADAPTER = "frozen"  # its name in peft, for which a layer may have several adapters

Place = tuple[int, str]  # block index and module inside the block


class _Factor(nn.Module):
    """x W^T with a weight that is not trained."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)


FrozenFactors = dict[Place, tuple[_Factor, _Factor]]


class FrozenSlots:
    """Where frozen factors go: a second adapter of each LoRA layer, which then computes

        base(x) + s B A dropout(x) + s frozen_B frozen_A x

    It has no dropout, since the product is as good as part of the base, and is there only while factors are mounted.
    """

    def __init__(self, layers: Mapping[Place, LoraLayer], active: str) -> None:
        """`active` is the name of the adapter that is trained, of which the scale s is taken."""
        self._layers = dict(layers)
        self._mounted: FrozenFactors = {}
        for layer in self._layers.values():
            layer.set_adapter([active, _ADAPTER])  # peft passes over one that is not there
            layer.scaling[_ADAPTER] = layer.scaling[active]
            layer.lora_dropout[_ADAPTER] = nn.Identity()

    def take(self, state: AdapterState, shapes: Mapping[AdapterKey, tuple[int, ...]], device: torch.device) -> FrozenFactors:
        """The frozen factors in `state`, where there are any, over its own arrays where `device` is the processor.

        `shapes` are those of the trained factors that may have frozen ones beside them. Raises `AdapterError` for a factor
        without the other or without trained ones, and for another shape than (any, in) and (out, the same).
        """
        found: dict[Place, dict[str, Array]] = {}
        for key, value in state.items():
            if key.part in (FROZEN_A, FROZEN_B):
                found.setdefault((key.layer, key.module), {})[key.part] = value
        factors: FrozenFactors = {}
        for (layer, module), pair in sorted(found.items()):
            for part in (FROZEN_A, FROZEN_B):
                if part not in pair or AdapterKey(layer, module, part[-1]) not in shapes:
                    problem = "is missing" if part not in pair else "has no trained factor beside it in this half"
                    raise AdapterError(f"adapter tensor {AdapterKey(layer, module, part)} {problem}")
            a, b = pair[FROZEN_A], pair[FROZEN_B]
            width, height = shapes[AdapterKey(layer, module, "A")][1], shapes[AdapterKey(layer, module, "B")][0]
            rank = len(a) if a.ndim else 0
            if a.shape != (rank, width) or b.shape != (height, rank):
                raise AdapterError(
                    f"frozen factors of {layer}/{module} have the shapes {a.shape} and {b.shape}, expected (F, {width}) and"
                    f" ({height}, F)"
                )
            if rank:
                factors[layer, module] = _Factor(torch.from_numpy(a).to(device)), _Factor(torch.from_numpy(b).to(device))
        return factors

    def mount(self, factors: FrozenFactors) -> None:
        """Have the layers apply these from now on, and no others."""
        if factors is self._mounted:
            return
        for place in self._mounted.keys() - factors.keys():
            layer = self._layers[place]
            del layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]
        for place, (a, b) in factors.items():
            self._layers[place].lora_A[_ADAPTER], self._layers[place].lora_B[_ADAPTER] = a, b
        self._mounted = factors


def frozen_state(factors: FrozenFactors) -> AdapterState:
    """Copies of the values, by their keys."""
    state: AdapterState = {}
    for (layer, module), pair in factors.items():
        for part, factor in zip((FROZEN_A, FROZEN_B), pair):
            state[AdapterKey(layer, module, part)] = factor.weight.cpu().numpy().copy()
    return state
