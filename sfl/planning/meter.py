"""What a computation takes: bytes of tensors alive and arithmetic, counted as torch carries it out, on any device or on none."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten: Any = torch.ops.aten


class Meter(TorchDispatchMode):
    """Counts while it is entered. `live`: bytes of tensors that were made inside and still exist, `peak` their highest number
    since `restart`, `flops`: additions and multiplications of all matrix products.

    Both directions of autograd are seen, and what a kernel needs for itself is not. Tensors made before are not counted.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self.flops = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def restart(self) -> None:
        """Begin a new peak."""
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if count := _FLOPS.get(func.overloadpacket):
            self.flops += count(args)
        given = {id(tensor.untyped_storage()) for tensor in _tensors(args)}
        for tensor in _tensors(result):
            self._add(tensor, given)
        return result

    def _add(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in given or storage in self._known:  # a view, or computed in place
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _matrix_product(first: int) -> Callable[[Any], int]:
    """2 M K N of a product (.., M, K) x (.., K, N) whose factors are the arguments `first` and `first` + 1."""
    return lambda args: int(2 * prod(args[first].shape) * args[first + 1].shape[-1])


def _attention(args: Any) -> int:
    """q k^T and the product with v: 2 x 2 B h T S d."""
    query, key = args[:2]
    return int(4 * prod(query.shape) * key.shape[-2])


_FLOPS: dict[Any, Callable[[Any], int]] = {
    _aten.mm: _matrix_product(0),
    _aten.bmm: _matrix_product(0),
    _aten.addmm: _matrix_product(1),
    _aten.baddbmm: _matrix_product(1),
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    # Given the output's gradient first; five products instead of two, as the probabilities are computed again.
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args: _attention(args[1:]) * 5 // 2,
}


class AsOnCpu(TorchFunctionMode):
    """Has tensors on the meta device, which have no values, go the way of padded batches on the CPU.

    Attention takes the CPU's fused kernel where the CPU would, and a question about values, such as whether a mask is all
    ones, is answered with no.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and args[0].is_meta:
            return _attend(*args, **kwargs)
        if func in _QUESTIONS and args[0].is_meta:
            return False
        if func is Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)


_QUESTIONS = {Tensor.item, Tensor.__bool__}


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    fused = dropout_p == 0.0 and query.shape[-1] == key.shape[-1] == value.shape[-1]
    if not fused:
        plain: Tensor = functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return plain
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    output: Tensor = _aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output


def as_on_cpu(module: nn.Module) -> None:
    """Run `module`'s forward pass under `AsOnCpu` from now on: autograd, which may repeat it, leaves modes around itself."""
    plain = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with AsOnCpu():
            return plain(*args, **kwargs)

    module.forward = forward  # type: ignore[method-assign]
