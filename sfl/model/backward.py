"""The backward pass of a half that ends in an activation: its gradient comes from elsewhere."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def backward_from(activation: Tensor, gradient: Tensor) -> None:
    """What `activation.backward(gradient)` does, and no more: gradients arrive in the parameters that `activation` stems from.

    torch's own way checks the gradient's shape with its symbolic shapes, whose import takes some 35 MB.
    """
    _Start.apply(activation, gradient).backward()  # type: ignore[no-untyped-call]


class _Start(torch.autograd.Function):
    """A scalar whose gradient by `activation` is `gradient`."""

    @staticmethod
    def forward(ctx: Any, activation: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient.to(activation)
        return activation.new_zeros(())

    @staticmethod
    def backward(ctx: Any, one: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient, None
