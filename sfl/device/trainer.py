"""The device's side of split training: forward to the cut, backward from it. Knows nothing of gRPC."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sfl.adapters.state import AdapterState
from sfl.allocator import release_freed_memory
from sfl.data.batches import Batch
from sfl.errors import WireError
from sfl.model.backward import backward_from
from sfl.model.cut import DeviceHalf
from sfl.model.local_adapter import LocalAdapter
from sfl.model.metrics import accuracy, macro_f1
from sfl.model.recompute import forward_in_micro_batches
from sfl.model.tasks import make_labels
from sfl.phases import phase
from sfl.wire.split import ORDINARY, CutBatch, Evaluation, StepResult, StepTerms


class EdgeLink(Protocol):
    """The edge as its device sees it: the other half of the model and of the adapter.

    Every method raises `RefusedError` with the edge's reason, `UnreachableError`, or `WireError` for an answer that does
    not fit the question.
    """

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY) -> StepResult:
        """Train the edge's half on one batch and return the gradient at the cut."""

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        """Loss and logits of one batch; nothing is trained."""

    def submit(self, submission: str, version: int) -> None:
        """Have the edge send its half of a submission."""

    def adopt(self, version: int, keep_progress: bool) -> None:
        """Switch the edge's half to a newer global version."""


@dataclass(frozen=True)
class TrainedStep:
    """One local optimiser step: its mean `loss` and the gradient norm of every adapter layer, of both halves."""

    loss: float
    layer_norms: dict[int, float]


@dataclass(frozen=True)
class Figures:
    """An evaluation: mean `loss` over `count` examples or tokens; accuracy and macro-F1 (0 to 1) of a classification."""

    loss: float
    count: int
    accuracy: float | None
    f1_macro: float | None


class DeviceTrainer:
    """Trains the device's half of an adapter together with the edge's, one batch a step.

    With `micro_batch` the device computes a batch so many examples at a time; to the edge it is one batch all the same.
    If memory is `tight`, what a step has freed goes back to the system.
    """

    def __init__(
        self, half: DeviceHalf, adapter: LocalAdapter, link: EdgeLink, task: str, micro_batch: int = 0, tight: bool = False
    ) -> None:
        self.adapter = adapter
        self._half = half
        self._link = link
        self._task = task
        self._micro_batch = micro_batch
        self._tight = tight

    def step(self, step: int, batch: Batch, terms: StepTerms = ORDINARY) -> TrainedStep:
        """Step number `step`, counted from 1: activation out, gradient in, one optimiser step on either side.

        The learning rate of `terms` is that of both halves.
        """
        self._half.train()
        self.adapter.mount()
        with phase("forward"):
            activation, cut_batch = self._forward(batch)
        with phase("wait"):
            result = self._link.step(step, self.adapter.version, cut_batch, terms)
        if (result.step, result.version) != (step, self.adapter.version):
            raise WireError(
                f"the edge answered step {result.step} of version {result.version}; step {step} of version"
                f" {self.adapter.version} was asked"
            )
        with phase("backward"):
            backward_from(activation, result.gradient)
        with phase("step"):
            norms = result.layer_norms | self.adapter.layer_norms()
            self.adapter.step(self.adapter.optimizer.rate(step) * terms.rate_factor)
        del activation, cut_batch
        if self._tight:
            release_freed_memory()
        return TrainedStep(result.loss, norms)

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> Figures:
        """Figures of this device's adapter over `batches`, through the split."""
        self._half.eval()
        self.adapter.mount()
        loss_sum, count = 0.0, 0
        truth: list[np.ndarray] = []
        predicted: list[np.ndarray] = []
        for batch in batches:
            result = self._link.evaluate(self.adapter.version, self._forward(batch)[1])
            loss_sum, count = loss_sum + result.loss * result.count, count + result.count
            if result.logits is not None and batch.labels is not None:
                truth.append(batch.labels)
                predicted.append(result.logits.argmax(dim=-1).numpy())
        mean = loss_sum / max(count, 1)
        if not truth:
            return Figures(mean, count, None, None)
        pair = np.concatenate(truth), np.concatenate(predicted)
        return Figures(mean, count, accuracy(*pair), macro_f1(*pair))

    def take_progress(self, submission: str) -> AdapterState:
        """Both halves set aside what was learnt since the last submission; the edge sends its own, this returns the device's."""
        self._link.submit(submission, self.adapter.version)
        return self.adapter.take_progress()

    def adopt(self, version: int, state: AdapterState, keep_progress: bool) -> None:
        """Both halves go on from global version `version`, of which `state` is the device's half."""
        self._link.adopt(version, keep_progress)
        self.adapter.adopt(state, version, keep_progress)

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, CutBatch]:
        """The activation with its graph, and what of the batch leaves the device."""
        input_ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        classes = None if batch.labels is None else torch.from_numpy(batch.labels)
        if 0 < self._micro_batch < len(batch):
            activation = forward_in_micro_batches(self._half, input_ids, mask, self._micro_batch)
        else:
            activation = self._half(input_ids, mask)
        return activation, CutBatch(activation.detach(), mask, make_labels(self._task, input_ids, mask, classes))
