"""Adapters and LoRA settings to and from their wire form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterKey, AdapterState, Array
from sfl.errors import AdapterError, WireError
from sfl.v1 import tensor_pb2
from sfl.v1.split_pb2 import Lora
from sfl.wire.tensors import RawTensor, from_numpy, to_numpy


def to_tensors(state: Mapping[AdapterKey, Array]) -> list[RawTensor]:
    """An adapter's tensors in the order of their keys."""
    return [from_numpy(str(key), state[key]) for key in sorted(state)]


def from_tensors(tensors: Sequence[RawTensor]) -> AdapterState:
    """The adapter that arrived. Raises `WireError` for a key that is none or comes twice, for another dtype than
    float32 and for values that are not finite."""
    state: AdapterState = {}
    for tensor in tensors:
        try:
            key = AdapterKey.parse(tensor.name)
        except AdapterError as error:
            raise WireError(str(error)) from error
        if key in state:
            raise WireError(f"adapter tensor {key} came twice in one message")
        if tensor.dtype != tensor_pb2.FLOAT32:
            raise WireError(f"adapter tensor {key} is not float32")
        state[key] = to_numpy(tensor)
    return state


def lora_to_wire(spec: LoraSpec) -> Lora:
    return Lora(rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout, target_modules=spec.target_modules)


def lora_from_wire(lora: Lora) -> LoraSpec:
    return LoraSpec(lora.rank, lora.alpha, lora.dropout, tuple(lora.target_modules))
