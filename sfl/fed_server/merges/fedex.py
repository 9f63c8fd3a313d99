"""FedEx-LoRA (Singhal et al. 2024): the average, made exact by a residual that is frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.fed_server.merges.base import Bases, Merge, Place, factors, places
from sfl.fed_server.merges.factors import Stack
from sfl.fed_server.merges.frozen import freeze
from sfl.fed_server.updates import Update, by_device


class FedEx(Merge):
    """W' = W + sum w_k (B_k A_k - B_k^0 A_k^0) = B' A' + frozen_B frozen_A, where A' and B' are the average.

    With all devices at the newest version and rank that is the mean of the products, (1 - s) W + sum w_k B_k A_k with
    s = sum w_k. A device of a smaller rank, or one that started from an older version, counts by what it has changed
    of its own view, so it takes nothing back. What is added to the frozen factors, with dA, dB the averages of dA_k, dB_k:

        sum w_k dB_k dA_k - dB dA + sum w_k [dB_k (A_k^0 - A) + (B_k^0 - B) dA_k]

    whose last sum is zero for devices at the newest version. Memory: the factors of one module of all devices.
    """

    name = "fedex"
    additive = True

    def merge(self, state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        result = self.averaged(state, updates, weights)
        bases = Bases()
        for place in places(state):
            freeze(result, place, *self._residual(state, place, updates, weights, bases).compressed())
        return result

    def _residual(
        self, state: AdapterState, place: Place, updates: Sequence[Update], weights: Mapping[str, float], bases: Bases
    ) -> Stack:
        a, b = factors(state, place)
        residual = Stack(len(b), a.shape[1])
        mean_a, mean_b = np.zeros(a.shape), np.zeros(b.shape)
        for update in by_device(updates):
            weight, rank = weights[update.device], update.rank
            da, db = factors(self.delta(state, update, [AdapterKey(*place, part) for part in ("A", "B")]), place)
            base_a, base_b = factors(bases.of(update), place)
            residual.add(weight * db, da + (base_a - a[:rank]))
            residual.add(weight * (base_b - b[:, :rank]), da)
            mean_a[:rank] += weight * da.astype(np.float64)
            mean_b[:, :rank] += weight * db.astype(np.float64)
        residual.add(-mean_b, mean_a)
        return residual
