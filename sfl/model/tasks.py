"""The two tasks: what the labels of a batch are, and what an evaluation adds up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from sfl.errors import ModelError, WireError

IGNORED = -100  # the label that Hugging Face's causal-LM loss leaves out


def make_labels(task: str, input_ids: Tensor, attention_mask: Tensor, classes: Tensor | None) -> Tensor:
    """Labels of a batch, int64: the classes (B,), or for a causal LM the ids (B, T) with -100 on padding.

    The model itself shifts a causal LM's labels by one. Raises `ModelError` when a classification batch has no classes.
    """
    if task == "causal-lm":
        return input_ids.masked_fill(attention_mask == 0, IGNORED)
    if classes is None or classes.shape != input_ids.shape[:1]:
        raise ModelError(f"classification of {len(input_ids)} texts needs as many classes")
    return classes.to(torch.int64)


def adjusted_loss(task: str, logits: Tensor, labels: Tensor, offsets: Sequence[float]) -> Tensor:
    """Mean cross-entropy, a scalar, of (B, classes) logits with `offsets`, one of each class, added to them.

    Raises `WireError` for another task than classification, and for another number of offsets than of classes.
    """
    if task != "classification" or len(offsets) != logits.shape[-1]:
        raise WireError(f"{len(offsets)} offsets of the logits came: only a classification has them, one of each of its classes")
    shifted = logits.float() + torch.tensor(offsets, dtype=torch.float32, device=logits.device)
    return cross_entropy(shifted, labels)


@dataclass(frozen=True)
class Score:
    """What one batch adds to an evaluation: `loss_sum / count` over all batches is the mean loss.

    `count` is texts, or for a causal LM predicted tokens. `predictions` are class indices (B,), None for a causal LM.
    """

    loss_sum: float
    count: int
    predictions: Tensor | None


def score(task: str, loss: Tensor, logits: Tensor, labels: Tensor) -> Score:
    """The figures of one batch, from its mean `loss` (scalar), `logits` and the labels that gave the loss."""
    if task == "causal-lm":
        count = int((labels[:, 1:] != IGNORED).sum())
        return Score(loss.item() * count if count else 0.0, count, None)
    return Score(loss.item() * len(labels), len(labels), logits.argmax(dim=-1).cpu())
