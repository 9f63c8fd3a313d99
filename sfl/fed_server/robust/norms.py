"""Norms of updates, and clipping to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.fed_server.robust.base import Screened, Screening
from sfl.fed_server.updates import Update, by_device


class NormClip(Screening):
    """delta_k * min(1, C / ||delta_k||) (Sun et al. 2019), with the C that is set, or for 0 the median of the pool's norms.

    The median needs n >= 2f + 1. An attacker's update stays, and counts no more than another's of its weight. The weight is not
    bounded: where it goes by |D_k|, that is the number that the device claims, and one that claims many counts as much.
    """

    name = "norm-clip"

    def __init__(self, attackers: int, norm: float = 0.0) -> None:
        super().__init__(attackers)
        self._norm = norm

    def screen(self, updates: Sequence[Update], weights: Mapping[str, float]) -> Screened:
        ordered = by_device(updates)
        norms = {update.device: norm(update) for update in ordered}
        limit = self._norm or float(np.median(list(norms.values())))
        changed = {device: limit / value for device, value in norms.items() if value > limit}
        kept = [scaled(update, changed[update.device]) if update.device in changed else update for update in ordered]
        return Screened(kept, {update.device: weights[update.device] for update in ordered}, changed=changed)


def norm(update: Update) -> float:
    """||delta_k||_2 over all its tensors, in float64."""
    return float(np.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in update.delta().values())))


def scaled(update: Update, factor: float) -> Update:
    """The update with its delta times `factor`, which is in effect as it is read."""

    def read(keys: Collection[AdapterKey] | None) -> AdapterState:
        return {key: np.float32(factor) * value for key, value in update.read(keys).items()}

    return dataclasses.replace(update, read=read)
