"""SplitLoRA's schedule at the edge: one half of an adapter for all devices, stepped in turn."""

from __future__ import annotations

import torch

from sfl.adapters.state import AdapterState, edge_half
from sfl.model.local_adapter import LocalAdapter
from sfl.wire.split import OptimizerSpec


class SharedAdapter:
    """One device's view of the edge adapter that all sessions share: its layers from the device's cut on.

    The adapter has the layers from the edge's lowest cut on, one optimiser and one set of moments. A step of a device at cut c
    trains the layers from c on, at the learning rate of that device's own schedule; the others are not touched.
    Whoever submits takes what the layers from its cut on have learnt since somebody last did, whichever devices have taught
    them: the sum over all submissions is all that was learnt, each part once.
    The first device that adopts a version moves the adapter there, and what nobody has submitted is kept or dropped as that
    device says; the others find it there when they adopt. Until then a device may still train its own half of an older
    version: `version` is the device's, and the adapter is never older. Under synchronous rounds all are of one version.
    """

    def __init__(self, adapter: LocalAdapter, cut: int, version: int, optimizer: OptimizerSpec) -> None:
        self.version = version
        self.optimizer = optimizer  # the device's; the schedule may be its own
        self._adapter = adapter
        self._cut = cut

    def mount(self) -> None:
        """As `LocalAdapter.mount`."""
        self._adapter.mount()

    def values(self) -> AdapterState:
        """Copies of what this device's half applies now, float32."""
        return edge_half(self._adapter.values(), self._cut)

    def tensors(self) -> dict[str, list[torch.Tensor]]:
        """As `LocalAdapter.tensors`: the same for all devices."""
        return self._adapter.tensors()

    def layer_norms(self) -> dict[int, float]:
        """As `LocalAdapter.layer_norms`."""
        return self._adapter.layer_norms()

    def step(self, rate: float) -> None:
        """As `LocalAdapter.step`, for the layers that the last backward pass has reached."""
        self._adapter.step(rate)

    def take_progress(self) -> AdapterState:
        """What this device's layers have learnt since any device last took it."""
        return self._adapter.take_progress(self._cut)

    def adopt(self, state: AdapterState, version: int, keep_progress: bool) -> None:
        """Be at `version`, of which `state` has the layers from the edge's lowest cut on."""
        if version > self._adapter.version:
            self._adapter.adopt(state, version, keep_progress)
        self.version = version
