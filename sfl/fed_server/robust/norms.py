"""Clipping of updates to a norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

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
        norms = {update.device: update.norm() for update in ordered}
        limit = self._norm or float(np.median(list(norms.values())))
        changed = {device: limit / value for device, value in norms.items() if value > limit}
        kept = [update.scaled(changed[update.device]) if update.device in changed else update for update in ordered]
        return Screened(kept, {update.device: weights[update.device] for update in ordered}, changed=changed)
