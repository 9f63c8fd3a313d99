"""Weights of few bits: quantised a slab at a time while they are read, so that they never exist whole in a larger format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from sfl.allocator import release_freed_memory
from sfl.errors import ModelError
from sfl.model.checkpoint import StoredTensor
from sfl.model.frozen import FrozenLinear

_SLAB = 1 << 20  # bytes of a stored weight that are quantised at a time


class QuantisedLinear(FrozenLinear):
    """Keeps `weight` (out, ...) in `kept` and `scale` (out, ...) in fp32, row for row; a packed checkpoint has them so."""

    kept: ClassVar[torch.dtype]
    scale: Tensor

    def __init__(self, like: nn.Module, transposed: bool) -> None:
        super().__init__(like, transposed)
        self.register_buffer("scale", torch.empty(0), persistent=False)

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What is kept of some fp32 rows of W (n, in): weight and scale. Raises `ModelError` for what is not finite."""
        raise NotImplementedError

    def kept_width(self) -> int:
        """Length of a row of `weight`."""
        return self.in_features

    def scale_shape(self) -> tuple[int, ...]:
        """The shape of `scale`."""
        return (self.out_features,)

    def stored_shape(self, stored: StoredTensor) -> tuple[int, ...]:
        return (self.out_features, self.kept_width()) if stored.dtype == self.kept else super().stored_shape(stored)

    def quantised(self, stored: StoredTensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`quantise` of all rows of a stored weight, some at a time; a transposed weight is read as a whole."""
        if self.transposed:
            yield self.quantise(stored.read(torch.float32).t().contiguous())
            return
        for first, last in stored.slabs(_SLAB):
            yield self.quantise(stored.rows(first, last).float())
        release_freed_memory()  # slabs leave holes

    def take(self, stored: StoredTensor, scale: StoredTensor | None) -> None:
        if stored.dtype == self.kept:
            if scale is None or scale.shape != self.scale_shape():
                found = "has none" if scale is None else f"has one of shape {tuple(scale.shape)}"
                raise ModelError(f"'{stored.name}' is quantised and needs a scale of shape {self.scale_shape()}, but {found}")
            self.hold(stored.mapped(), scale.read(torch.float32))
            return
        weight, scales, first = torch.empty(self.out_features, self.kept_width(), dtype=self.kept), [], 0
        for rows, row_scales in self.quantised(stored):
            weight[first : first + len(rows)] = rows
            scales.append(row_scales)
            first += len(rows)
        self.hold(weight, torch.cat(scales))

    def hold(self, weight: Tensor, scale: Tensor) -> None:
        """Keep these, which `quantise` has made."""
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = scale


class Int8Linear(QuantisedLinear):
    """W[i, j] = weight[i, j] scale[i] with |weight| <= 127 and scale[i] = max_j |W[i, j]| / 127: symmetric, to nearest."""

    kept = torch.int8

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scale = require_finite(rows.abs().amax(dim=1)) / 127
        scale[scale == 0] = 1.0  # a row of zeros stays one
        return (rows / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.weight[first:last].to(dtype)

    def columns(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self.weight[:, first:last].to(dtype)

    def row_scale(self) -> Tensor:
        return self.scale  # of the product: whole numbers up to 127 are exact in bf16, their product with a scale is not


class Nf4Linear(QuantisedLinear):
    """Two 4-bit "normal floats" a byte, and one scale for each 64 of a row (QLoRA, section 3), through bitsandbytes.

    Rows are padded with zeros to a multiple of 64, so that rows and columns can be taken apart.
    """

    kept = torch.uint8
    _BLOCK = 64

    def kept_width(self) -> int:
        return self._blocks() * self._BLOCK // 2

    def scale_shape(self) -> tuple[int, ...]:
        return (self.out_features, self._blocks())

    def quantise(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        from sfl.model.bitsandbytes_nf4 import quantise

        padded = functional.pad(rows, (0, 2 * self.kept_width() - self.in_features))
        weight, scale = quantise(padded, self._BLOCK)
        require_finite(scale)
        return weight.reshape(len(rows), -1), scale.reshape(len(rows), -1)

    def rows(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        return self._dequantise(self.weight[first:last], self.scale[first:last], dtype)[:, : self.in_features]

    def columns(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        end = -(-last // self._BLOCK)
        weight = self.weight[:, first // 2 : end * self._BLOCK // 2]
        return self._dequantise(weight, self.scale[:, first // self._BLOCK : end], dtype)[:, : last - first]

    def _blocks(self) -> int:
        return -(-self.in_features // self._BLOCK)

    def _dequantise(self, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        from sfl.model.bitsandbytes_nf4 import dequantise

        return dequantise(weight.contiguous(), scale.contiguous(), self._BLOCK, dtype)


def require_finite(scale: Tensor) -> Tensor:
    """`scale` itself. Raises `ModelError` when a weight that it comes from is not finite."""
    if not scale.isfinite().all():
        raise ModelError("a weight is not finite, so it cannot be quantised: take another checkpoint")
    return scale
