"""Raw tensors to and from torch, for the daemons that have it."""

from __future__ import annotations

import torch

from sfl.errors import WireError
from sfl.v1 import tensor_pb2 as pb
from sfl.wire.tensors import RawTensor

WIRE_DTYPE: dict[torch.dtype, pb.DType] = {
    torch.float32: pb.FLOAT32,
    torch.bfloat16: pb.BFLOAT16,
    torch.float16: pb.FLOAT16,
    torch.int64: pb.INT64,
}
_TORCH: dict[pb.DType, torch.dtype] = {wire: dtype for dtype, wire in WIRE_DTYPE.items()}


def from_torch(name: str, tensor: torch.Tensor) -> RawTensor:
    """Wrap a tensor; no copy for a contiguous one in CPU memory. NumPy has no bfloat16, so bytes are viewed as such."""
    if tensor.dtype not in WIRE_DTYPE:
        raise WireError(f"tensor '{name}' has dtype {tensor.dtype}, which cannot be sent")
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return RawTensor(name, WIRE_DTYPE[tensor.dtype], tuple(tensor.shape), flat.view(torch.uint8).numpy().data)


def to_torch(tensor: RawTensor) -> torch.Tensor:
    """A CPU tensor over the received bytes. Raises `WireError` for a value that is not finite."""
    if memoryview(tensor.data).nbytes == 0:
        return torch.empty(tensor.shape, dtype=_TORCH[tensor.dtype])
    result = torch.frombuffer(tensor.data, dtype=_TORCH[tensor.dtype]).reshape(tensor.shape)
    if result.is_floating_point() and not torch.isfinite(result).all():
        raise WireError(f"tensor '{tensor.name}' holds values that are not finite")
    return result
