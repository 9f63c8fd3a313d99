"""An edge for profiling: answers with a random gradient, over frames that are really made, serialised and put together."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from sfl.errors import WireError
from sfl.v1 import split_pb2 as pb
from sfl.v1 import tensor_pb2
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.wire.frames import CHUNK_BYTES, Assembler, Traffic, frames
from sfl.wire.split import (
    ORDINARY,
    CutBatch,
    Evaluation,
    StepResult,
    StepTerms,
    batch_to_wire,
    step_from_wire,
    step_request,
)
from sfl.wire.tensors import ITEM_BYTES
from sfl.wire.torch_tensors import WIRE_DTYPE

_SCALE = 1e-3  # of the gradient, so that the adapter stays finite


class StandInEdge:
    """What a device's process holds for the wire is as with a real edge; what the edge would hold is not in this process.

    The gradient is made one chunk at a time for this reason. Nothing is sent: gRPC's own threads and buffers are left out.
    """

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._assembler: Assembler[EdgeMessage] = Assembler(self.traffic)

    def begin(self, session: str, version: int, last_step: int = 0, checkpoint: int = 0) -> None:
        """There is nothing to open."""

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY, checkpoint: int = 0) -> StepResult:
        message = DeviceMessage(step=step_request(step, version, terms, checkpoint))
        outgoing = list(frames(message, batch_to_wire(batch), self.traffic))  # all wait in a queue, as with the real link
        outgoing.reverse()
        while outgoing:
            DeviceMessage.FromString(outgoing.pop().SerializeToString())
        for data in self._answer(step, version, batch.activation):
            whole = self._assembler.feed(EdgeMessage.FromString(data))
            if whole is not None:
                reply, tensors = whole
                return step_from_wire(reply.step, tensors, batch.activation)
        raise WireError("the frames of the answer made no whole message")

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        raise WireError("a stand-in has no deeper blocks to evaluate with")

    def submit(self, submission: str, version: int, checkpoint: int = 0) -> None:
        """Nobody takes it."""

    def adopt(self, version: int, keep_progress: bool, checkpoint: int = 0) -> None:
        """There is no other version."""

    def look(self) -> None:
        """It is here."""

    def _answer(self, step: int, version: int, like: Tensor) -> Iterator[bytes]:
        """The serialised frames of a step's answer."""
        dtype = WIRE_DTYPE[like.dtype]
        header = tensor_pb2.TensorHeader(
            name="gradient",
            dtype=dtype,
            shape=like.shape,
            codec=tensor_pb2.RAW,
            byte_length=math.prod(like.shape) * ITEM_BYTES[dtype],
        )
        yield EdgeMessage(step=pb.StepDone(step=step, version=version, loss=1.0), tensors=[header]).SerializeToString()
        per_chunk = CHUNK_BYTES // ITEM_BYTES[dtype]
        for start in range(0, like.numel(), per_chunk):
            values = _SCALE * torch.randn(min(per_chunk, like.numel() - start))
            yield EdgeMessage(chunk=values.to(like.dtype).view(torch.uint8).numpy().tobytes()).SerializeToString()
