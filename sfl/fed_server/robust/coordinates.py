"""Rules that look at each value by itself, across all updates."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import numpy as np

from sfl.adapters.state import AdapterKey, AdapterState, Array
from sfl.fed_server.robust.base import Combining
from sfl.fed_server.robust.krum import distances, score
from sfl.fed_server.robust.rows import rows
from sfl.fed_server.updates import Update, by_device


class CoordinateWise(Combining):
    """One update whose every value is made of the same value of all the others, or of those that are chosen."""

    def combine(self, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        flat: dict[AdapterKey, Array] = {}
        shapes: dict[AdapterKey, tuple[int, ...]] = {}
        for key, shape, piece, values in rows(self.chosen(by_device(updates))):
            if key not in flat:
                flat[key], shapes[key] = np.empty(int(np.prod(shape)), np.float32), shape
            flat[key][piece] = self.values(values)
        return {key: value.reshape(shapes[key]) for key, value in flat.items()}

    def chosen(self, updates: Sequence[Update]) -> Sequence[Update]:
        """The updates to go on with."""
        return updates

    @abstractmethod
    def values(self, values: Array) -> Array:
        """One value for each column; `values` is (number of updates x columns) and may be changed."""


class Median(CoordinateWise):
    """The coordinate-wise median (Yin et al. 2018), n >= 2f + 1; of an even number the mean of the middle two."""

    name = "median"

    def values(self, values: Array) -> Array:
        result: Array = np.median(values, axis=0, overwrite_input=True)
        return result


class TrimmedMean(CoordinateWise):
    """The coordinate-wise trimmed mean (Yin et al. 2018), n >= 2f + 1: without the f least and the f greatest values."""

    name = "trimmed-mean"

    def values(self, values: Array) -> Array:
        values.sort(axis=0)
        result: Array = values[self.attackers : len(values) - self.attackers].mean(axis=0)
        return result


class Bulyan(CoordinateWise):
    """Bulyan (El Mhamdi et al. 2018), n >= 4f + 3.

    Krum chooses the best of those that are left, again and again, until there are t = n - 2f; then each value is the mean of
    the t - 2f that are nearest to the median of the t.
    """

    name = "bulyan"

    def chosen(self, updates: Sequence[Update]) -> Sequence[Update]:
        squares = distances(updates)
        left = list(range(len(updates)))
        taken: list[int] = []
        while len(taken) < len(updates) - 2 * self.attackers:
            best = min(left, key=lambda index: (score(squares, index, left, self.attackers), index))
            left.remove(best)
            taken.append(best)
        return [updates[index] for index in sorted(taken)]

    def values(self, values: Array) -> Array:
        away = np.abs(values - np.median(values, axis=0))
        nearest = np.argsort(away, axis=0, kind="stable")[: len(values) - 2 * self.attackers]
        result: Array = np.take_along_axis(values, nearest, axis=0).mean(axis=0)
        return result
