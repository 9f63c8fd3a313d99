"""Linear layers whose weight is frozen: kept in one number format, computed in another, and never whole in the latter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfl.model.checkpoint import StoredTensor

_SLAB = {"cpu": 2 << 20, "cuda": 64 << 20}  # bytes of a weight that exist in the format of the computation at a time


class FrozenLinear(nn.Linear):
    """x W^T + b. A subclass says how W (out, in) is kept and what a slab of it is in the format of x.

    Forward takes slabs of W's rows, backward of its columns, so that each number of a result comes from one product. Nothing
    is saved for the backward pass: neither x nor W needs a gradient of W.
    """

    def __init__(self, like: nn.Module, transposed: bool) -> None:
        """Stands for `like`, an nn.Linear or, `transposed`, a Conv1D, on the meta device; `take` brings the weight."""
        nn.Module.__init__(self)
        shape = tuple(like.get_parameter("weight").shape)
        self.out_features, self.in_features = shape[::-1] if transposed else shape
        self.transposed = transposed
        self.weight = nn.Parameter(torch.empty(0, dtype=torch.uint8, device="meta"), requires_grad=False)
        self.bias = like.bias  # type: ignore[assignment]
        self._is_hf_initialized = True  # for transformers: there is nothing to initialise

    def stored_shape(self, stored: StoredTensor) -> tuple[int, ...]:
        """The shape in which a checkpoint has to have the weight."""
        return (self.in_features, self.out_features) if self.transposed else (self.out_features, self.in_features)

    def take(self, stored: StoredTensor, scale: StoredTensor | None) -> None:
        """Bring the weight from a checkpoint into the format in which it is kept."""
        raise NotImplementedError

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Rows `first` to `last` - 1 of W, less the scale of each row: (last - first, in)."""
        raise NotImplementedError

    def columns(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Columns `first` to `last` - 1 of W, less the scale of each row: (out, last - first)."""
        raise NotImplementedError

    def row_scale(self) -> Tensor | None:
        """What each row of W is still to be multiplied by, (out,) fp32."""
        return None

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear calls it so
        """(..., out) in the dtype of `input` (..., in)."""
        result: Tensor = _Product.apply(input, self)  # type: ignore[no-untyped-call]
        return result

    def slabs(self, count: int, width: int, itemsize: int) -> Iterator[tuple[int, int]]:
        """Ranges that make up `count` rows or columns, each `width` long, of about the size that may exist at a time."""
        step = max(64, _SLAB.get(self.weight.device.type, _SLAB["cpu"]) // (width * itemsize) // 64 * 64)
        return ((first, min(first + step, count)) for first in range(0, count, step))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenLinear) -> Tensor:
        ctx.layer = layer
        flat, scale, bias = x.reshape(-1, layer.in_features), layer.row_scale(), layer.bias
        result = flat.new_empty(len(flat), layer.out_features)
        for first, last in layer.slabs(layer.out_features, layer.in_features, x.element_size()):
            part = None if bias is None else bias[first:last]
            weight = layer.rows(first, last, x.dtype)
            if scale is None:
                result[:, first:last] = functional.linear(flat, weight, part)
            else:
                product = functional.linear(flat, weight) * scale[first:last]
                result[:, first:last] = product if part is None else product + part
        return result.reshape(*x.shape[:-1], layer.out_features)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        layer: FrozenLinear = ctx.layer
        flat, scale = gradient.reshape(-1, layer.out_features), layer.row_scale()
        if scale is not None:
            flat = _scaled(flat, scale)
        result = flat.new_empty(len(flat), layer.in_features)
        for first, last in layer.slabs(layer.in_features, layer.out_features, gradient.element_size()):
            result[:, first:last] = flat @ layer.columns(first, last, gradient.dtype)
        return result.reshape(*gradient.shape[:-1], layer.in_features), None


def _scaled(rows: Tensor, scale: Tensor) -> Tensor:
    """`rows` times fp32 `scale` in the dtype of `rows`; products are made in fp32, some rows at a time."""
    result = torch.empty_like(rows)
    for first in range(0, len(rows), 64):
        result[first : first + 64] = rows[first : first + 64] * scale
    return result


class CastLinear(FrozenLinear):
    """W kept as the floating-point `kept`, and mapped where the checkpoint has it so."""

    def __init__(self, like: nn.Module, transposed: bool, kept: torch.dtype) -> None:
        super().__init__(like, transposed)
        self._kept = kept

    def take(self, stored: StoredTensor, scale: StoredTensor | None) -> None:
        value = stored.mapped() if stored.dtype == self._kept else stored.read(self._kept)
        self.weight = nn.Parameter(value.t() if self.transposed else value, requires_grad=False)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.weight[first:last].to(dtype)

    def columns(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.weight[:, first:last].to(dtype)
