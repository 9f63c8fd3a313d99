"""What a training step sends each way, to the byte: the frames that `sfl.wire` makes, without gRPC's own few bytes a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sfl.adapters.state import HEAD
from sfl.data.settings import Task
from sfl.settings import Compute
from sfl.v1 import split_pb2, tensor_pb2
from sfl.wire.frames import CHUNK_BYTES
from sfl.wire.tensors import FORMATS, ITEM_BYTES, check_header


class StepBytes(NamedTuple):
    """`up` from the device to the edge, `down` back to it."""

    up: int
    down: int


def step_bytes(compute: Compute, task: Task, batch: int, length: int, hidden: int, cut: int, blocks: int) -> StepBytes:
    """Bytes of step 1 of a version above 0: activation (B, T, H), mask (B, T) and labels, and their gradient with a norm for
    each of the edge's layers. A larger number of the step or version takes a byte or two more."""
    activation = _header("activation", FORMATS[compute], (batch, length, hidden))
    mask = _header("attention_mask", tensor_pb2.INT64, (batch, length))
    labels = _header("labels", tensor_pb2.INT64, (batch, length) if task == "causal-lm" else (batch,))
    gradient = _header("gradient", FORMATS[compute], (batch, length, hidden))
    layers = [*range(cut, blocks), *([] if task == "causal-lm" else [HEAD])]
    norms = [split_pb2.LayerNorm(layer=layer, norm=1.0) for layer in layers]
    question = split_pb2.DeviceMessage(step=split_pb2.Step(step=1, version=1), tensors=[activation, mask, labels])
    answer = split_pb2.EdgeMessage(step=split_pb2.StepDone(step=1, version=1, loss=1.0, layer_norms=norms), tensors=[gradient])
    return StepBytes(_framed(question, [activation, mask, labels]), _framed(answer, [gradient]))


def _header(name: str, dtype: tensor_pb2.DType, shape: Sequence[int]) -> tensor_pb2.TensorHeader:
    count = ITEM_BYTES[dtype]
    for size in shape:
        count *= size
    header = tensor_pb2.TensorHeader(name=name, dtype=dtype, shape=shape, codec=tensor_pb2.RAW, byte_length=count)
    check_header(header)
    return header


def _framed(message: split_pb2.DeviceMessage | split_pb2.EdgeMessage, headers: Sequence[tensor_pb2.TensorHeader]) -> int:
    whole, rest = divmod(sum(header.byte_length for header in headers), CHUNK_BYTES)
    chunks = [CHUNK_BYTES, rest] if rest else [CHUNK_BYTES]
    sizes = [type(message)(chunk=bytes(chunk)).ByteSize() for chunk in chunks]
    return message.ByteSize() + whole * sizes[0] + sum(sizes[1:])
