"""Krum and Multi-Krum: updates that have others near them are believed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from sfl.fed_server.robust.base import Screened, Screening, selected
from sfl.fed_server.robust.rows import rows
from sfl.fed_server.updates import Update, by_device

Squares = npt.NDArray[np.float64]


class MultiKrum(Screening):
    """Multi-Krum (Blanchard et al. 2017), n >= 2f + 3: the n - f updates of the least score, where

        score_i = sum of ||delta_i - delta_j||^2 over the n - f - 2 updates j nearest to i

    over all factors and the head. Distances are taken between factors, zero-padded where ranks differ, so they
    say most for devices that have started from the same version.
    """

    name = "multi-krum"

    def screen(self, updates: Sequence[Update], weights: Mapping[str, float]) -> Screened:
        ordered = by_device(updates)
        squares = distances(ordered)
        scores = {update.device: score(squares, i, range(len(ordered)), self.attackers) for i, update in enumerate(ordered)}
        ranked = sorted(scores, key=lambda device: (scores[device], device))
        chosen, others = ranked[: self._count(len(ordered))], ranked[self._count(len(ordered)) :]
        worst = scores[chosen[-1]]
        reasons = {
            device: f"{self.name}: its distance from the updates nearest to it, {np.sqrt(scores[device]):.4g} in all, is greater"
            f" than that of those chosen, {np.sqrt(worst):.4g} at most"
            for device in others
        }
        return selected(ordered, weights, chosen, reasons)

    def _count(self, updates: int) -> int:
        return updates - self.attackers


class Krum(MultiKrum):
    """Krum (Blanchard et al. 2017), n >= 2f + 3: the one update of the least score, with the weight of all."""

    name = "krum"

    def _count(self, updates: int) -> int:
        return 1


def distances(updates: Sequence[Update]) -> Squares:
    """||delta_i - delta_j||^2 of all pairs, from their scalar products, which add up piece by piece."""
    gram = np.zeros((len(updates), len(updates)))
    for _, _, _, values in rows(updates):
        wide = values.astype(np.float64)
        gram += wide @ wide.T
    own = np.diag(gram)
    return np.maximum(own[:, None] + own[None, :] - 2 * gram, 0.0)


def score(squares: Squares, index: int, among: Collection[int], attackers: int) -> float:
    """Krum's score of an update among those at the places `among`, itself one of them; at least its nearest one counts."""
    others = np.sort([squares[index, other] for other in among if other != index])
    return float(np.sum(others[: max(1, len(among) - attackers - 2)]))
