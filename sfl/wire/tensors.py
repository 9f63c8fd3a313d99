"""Tensors as raw little-endian bytes with dtype and shape, checked before use. NumPy only."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sfl.errors import WireError
from sfl.v1 import tensor_pb2 as pb

_MAX_DIMENSIONS, _MAX_ITEMS = 8, 2**40  # more than any tensor has, less than an array can have
ITEM_BYTES: dict[pb.DType, int] = {pb.FLOAT32: 4, pb.BFLOAT16: 2, pb.FLOAT16: 2, pb.INT64: 8}
FORMATS: dict[str, pb.DType] = {"fp32": pb.FLOAT32, "bf16": pb.BFLOAT16}  # of activations and gradients, as settings call them
_NUMPY: dict[pb.DType, str] = {pb.FLOAT32: "<f4", pb.FLOAT16: "<f2", pb.INT64: "<i8"}
_NAMES: dict[str, pb.DType] = {np.dtype(code).str: dtype for dtype, code in _NUMPY.items()}


@dataclass(frozen=True)
class RawTensor:
    """A tensor as it travels: `data` holds `prod(shape)` items of `dtype`, little-endian and row-major."""

    name: str
    dtype: pb.DType
    shape: tuple[int, ...]
    data: memoryview | bytes | bytearray

    def header(self) -> pb.TensorHeader:
        return pb.TensorHeader(
            name=self.name, dtype=self.dtype, shape=self.shape, codec=pb.RAW, byte_length=memoryview(self.data).nbytes
        )


def check_header(header: pb.TensorHeader) -> None:
    """Raise `WireError` unless dtype and codec are known and the length is what the shape needs."""
    if header.codec != pb.RAW:
        raise WireError(f"tensor '{header.name}' has codec {header.codec}, which this version does not know")
    if header.dtype not in ITEM_BYTES:
        raise WireError(f"tensor '{header.name}' has dtype {header.dtype}, which this version does not know")
    if any(size < 0 for size in header.shape):
        raise WireError(f"tensor '{header.name}' has a negative size in its shape {list(header.shape)}")
    if len(header.shape) > _MAX_DIMENSIONS or math.prod(max(size, 1) for size in header.shape) > _MAX_ITEMS:
        raise WireError(f"tensor '{header.name}' has a shape that no tensor has: {list(header.shape)[: _MAX_DIMENSIONS + 1]}")
    expected = math.prod(header.shape) * ITEM_BYTES[header.dtype]
    if header.byte_length != expected:
        raise WireError(
            f"tensor '{header.name}' of shape {list(header.shape)} announces {header.byte_length} bytes, expected {expected}"
        )


def require(tensor: RawTensor, name: str, dtype: pb.DType, shape: tuple[int | None, ...]) -> None:
    """Raise `WireError` unless `tensor` has this name, dtype and shape; None in `shape` stands for any size but 0."""
    if tensor.name != name:
        raise WireError(f"expected tensor '{name}', got '{tensor.name}'")
    if tensor.dtype != dtype:
        raise WireError(f"tensor '{name}' has dtype {pb.DType.Name(tensor.dtype)}, expected {pb.DType.Name(dtype)}")
    fits = len(tensor.shape) == len(shape) and all(
        size == want if want is not None else size > 0 for size, want in zip(tensor.shape, shape)
    )
    if not fits:
        wanted = "x".join("?" if size is None else str(size) for size in shape)
        raise WireError(f"tensor '{name}' has shape {'x'.join(map(str, tensor.shape))}, expected {wanted}")


def from_numpy(name: str, array: npt.NDArray[Any]) -> RawTensor:
    """Wrap a float32, float16 or int64 array, without a copy where it is contiguous and little-endian."""
    dtype = _NAMES.get(array.dtype.newbyteorder("<").str)
    if dtype is None:
        raise WireError(f"tensor '{name}' has dtype {array.dtype}, which cannot be sent")
    array = np.ascontiguousarray(array, dtype=_NUMPY[dtype]).reshape(array.shape)
    return RawTensor(name, dtype, array.shape, array.reshape(-1).view(np.uint8).data)


def to_numpy(tensor: RawTensor) -> npt.NDArray[Any]:
    """An array over the received bytes. Raises `WireError` for a value that is not finite."""
    if tensor.dtype not in _NUMPY:
        raise WireError(f"tensor '{tensor.name}' has dtype {pb.DType.Name(tensor.dtype)}, which NumPy cannot hold")
    array = np.frombuffer(tensor.data, dtype=_NUMPY[tensor.dtype]).reshape(tensor.shape)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise WireError(f"tensor '{tensor.name}' holds values that are not finite")
    return array if sys.byteorder == "little" else array.astype(array.dtype.newbyteorder("="))
