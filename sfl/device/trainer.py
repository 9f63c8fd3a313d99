"""The device's side of split training: forward to the cut, backward from it. Knows nothing of gRPC."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sfl.allocator import release_freed_memory
from sfl.data.batches import Batch
from sfl.errors import WireError
from sfl.model import chance
from sfl.model.backward import backward_from
from sfl.model.cut import DeviceHalf
from sfl.model.local_adapter import LocalAdapter
from sfl.model.metrics import accuracy, macro_f1
from sfl.model.recompute import forward_in_micro_batches
from sfl.model.tasks import make_labels
from sfl.phases import phase
from sfl.state_file import Tensors
from sfl.wire.split import ORDINARY, CutBatch, Evaluation, StepResult, StepTerms


class WentBack(Exception):
    """The edge has lost its memory and is at a checkpoint that is behind the device's last step; the question is void."""

    def __init__(self, checkpoint: int) -> None:
        super().__init__(f"the edge server has gone back to checkpoint {checkpoint}")
        self.checkpoint = checkpoint


class EdgeLink(Protocol):
    """The edge as its device sees it: the other half of the model and of the adapter.

    Where `checkpoint` is not 0, the edge keeps its state under that number before it answers; see split.proto.
    Every method raises `RefusedError` with the edge's reason, `UnreachableError`, or `WireError` for an answer that does
    not fit the question. All but `begin` also raise `WentBack`, and `SessionLostError` when the edge knows the session no more.
    """

    def begin(self, session: str, version: int, last_step: int = 0, checkpoint: int = 0) -> None:
        """Open a session of this name with a global version, the device having done `last_step` steps before."""

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY, checkpoint: int = 0) -> StepResult:
        """Train the edge's half on one batch and return the gradient at the cut. The edge's `checkpoint` is that before it."""

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        """Loss and logits of one batch; nothing is trained."""

    def submit(self, submission: str, version: int, checkpoint: int = 0) -> None:
        """Have the edge set its half of a submission aside and send it; its `checkpoint` is that afterwards."""

    def adopt(self, version: int, keep_progress: bool, checkpoint: int = 0) -> None:
        """Switch the edge's half to a newer global version; its `checkpoint` is that afterwards."""

    def look(self) -> None:
        """Ask the edge nothing, but see that it has this session, unless it is away at the moment."""


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
        self.edge = link
        self._half = half
        self._task = task
        self._micro_batch = micro_batch
        self._tight = tight

    def step(self, step: int, batch: Batch, terms: StepTerms = ORDINARY, checkpoint: int = 0) -> TrainedStep:
        """Step number `step`, counted from 1: activation out, gradient in, one optimiser step on either side.

        The learning rate of `terms` is that of both halves. The edge keeps `checkpoint` before it.
        """
        self._half.train()
        self.adapter.mount()
        with phase("forward"):
            activation, cut_batch = self._forward(batch)
        with phase("wait"):
            result = self.edge.step(step, self.adapter.version, cut_batch, terms, checkpoint)
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
            result = self.edge.evaluate(self.adapter.version, self._forward(batch)[1])
            loss_sum, count = loss_sum + result.loss * result.count, count + result.count
            if result.logits is not None and batch.labels is not None:
                truth.append(batch.labels)
                predicted.append(result.logits.argmax(dim=-1).numpy())
        mean = loss_sum / max(count, 1)
        if not truth:
            return Figures(mean, count, None, None)
        pair = np.concatenate(truth), np.concatenate(predicted)
        return Figures(mean, count, accuracy(*pair), macro_f1(*pair))

    def state(self) -> Tensors:
        """The adapter's tensors, and what dropout draws from."""
        return self.adapter.state() | chance.to_arrays(chance.current())

    def restore(self, tensors: Tensors, version: int) -> None:
        """Be where the trainer was whose `state` this is. Raises `AdapterError` as `LocalAdapter.restore` does."""
        self.adapter.restore(tensors, version)
        chance.use(chance.from_arrays(tensors))

    def _forward(self, batch: Batch) -> tuple[torch.Tensor, CutBatch]:
        """The activation with its graph, and what of the batch leaves the device."""
        input_ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        classes = None if batch.labels is None else torch.from_numpy(batch.labels)
        if 0 < self._micro_batch < len(batch):
            activation = forward_in_micro_batches(self._half, input_ids, mask, self._micro_batch)
        else:
            activation = self._half(input_ids, mask)
        return activation, CutBatch(activation.detach(), mask, make_labels(self._task, input_ids, mask, classes))
