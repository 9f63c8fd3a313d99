"""Which tensors exist while one step is computed: activations that the backward pass needs, and temporaries."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_CPU = "cpu"


@dataclass(frozen=True)
class _Storage:
    weak: StorageWeakRef
    nbytes: int
    forward: bool  # made with autograd on: by the forward pass, or by its repetition during the backward pass

    def expired(self) -> bool:
        return bool(self.weak.expired())  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Counted:
    """Bytes on the CPU at the moment of a phase when most tensors existed."""

    activations: int
    temporaries: int


@dataclass
class _Highest:
    nbytes: int = 0
    storages: list[_Storage] = field(default_factory=list)


class StepCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation of one training step and keeps count of the storages that live, each once.

    This counts what autograd saves also where a checkpoint hides it from `saved_tensors_hooks`: a block that is computed
    anew during the backward pass. Memory that a kernel takes for itself (oneDNN's reordered weights) is no tensor's.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phases: dict[str, Counted] = {}
        self._live: dict[int, _Storage] = {}
        self._highest = _Highest()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if _countable(leaf)}
        for leaf in tree_leaves(result):
            if _countable(leaf):
                storage = leaf.untyped_storage()
                if storage._cdata not in inputs and storage._cdata not in self._live:
                    weak = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                    self._live[storage._cdata] = _Storage(weak, storage.nbytes(), torch.is_grad_enabled())
        self._look()
        return result

    def end_of(self, phase: str, known: Iterable[Tensor]) -> None:
        """Settle the phase that ends here; `known` tensors (weights, adapter, gradients, optimiser) are counted elsewhere."""
        self._look()
        elsewhere = {tensor.untyped_storage()._cdata for tensor in known}
        at_peak = [storage for storage in self._highest.storages if storage.weak.cdata not in elsewhere]
        # Backward frees activations as it goes. In any other phase, what is still there at its end is what is kept.
        lasting = at_peak if phase == "backward" else [s for s in self._live.values() if s.weak.cdata not in elsewhere]
        activations = sum(storage.nbytes for storage in lasting if storage.forward)
        self.phases[phase] = Counted(activations, max(0, sum(storage.nbytes for storage in at_peak) - activations))
        self._highest = _Highest()
        self._look()

    def _look(self) -> None:
        self._live = {key: storage for key, storage in self._live.items() if not storage.expired()}
        nbytes = sum(storage.nbytes for storage in self._live.values())
        if nbytes > self._highest.nbytes:
            self._highest = _Highest(nbytes, list(self._live.values()))


def _countable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == _CPU and leaf.layout == torch.strided
