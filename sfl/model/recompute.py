"""Trading time for memory in a device's half: what the backward pass needs is computed again instead of kept."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfl.model.cut import DeviceHalf


def recompute_blocks(half: DeviceHalf) -> None:
    """Activation checkpointing: from now on a block keeps only its input, and one block's activations exist at a time.

    Each block is computed twice; dropout draws the same numbers both times.
    """
    for block in half.own_blocks.values():
        _checkpoint(block)


def _checkpoint(block: nn.Module) -> None:
    plain = block.forward

    def twice(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        return checkpoint(partial(plain, **kwargs), *args, use_reentrant=False)

    block.forward = twice  # type: ignore[method-assign]


def forward_in_micro_batches(half: DeviceHalf, input_ids: Tensor, attention_mask: Tensor, size: int) -> Tensor:
    """The half's activation (B, T, H) of a batch (B, T), computed `size` examples at a time.

    Nothing is kept for the backward pass, which runs each micro-batch forward once more: one micro-batch's activations exist
    at a time, and the gradients of all add up to the batch's.
    """
    parts = zip(torch.split(input_ids, size), torch.split(attention_mask, size))
    if not torch.is_grad_enabled():
        return torch.cat([half(ids, mask) for ids, mask in parts])
    return torch.cat([checkpoint(half, ids, mask, use_reentrant=False) for ids, mask in parts])
