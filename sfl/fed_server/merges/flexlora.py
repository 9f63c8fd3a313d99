"""FlexLoRA (Bai et al. 2024): the best approximation of the mean of the products, and of that for each device's rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from sfl.adapters.state import HEAD, AdapterKey, AdapterState
from sfl.fed_server.merges.base import Bases, Merge, Place, check_rank, factors, places
from sfl.fed_server.merges.factors import Exact, Stack, best
from sfl.fed_server.updates import Update, by_device


class FlexLora(Merge):
    """B A <- the best approximation, with rank R, of B A + sum w_k (B_k A_k - B_k^0 A_k^0), from stacked factors (FLoRIST).

    With all devices at the newest version and rank that is the paper's mean of the products, (1 - s) B A + sum w_k B_k A_k with
    s = sum w_k. A device of a smaller rank, or one that started from an older version, counts by what it has changed of
    its own view: what it does not hold stays. As published (`FlexLoraPrinted`) that counts as zero, so what only the larger
    ranks hold shrinks in every version.

    Each device's view is the best approximation of its rank. Views take their singular values themselves, so the
    state need not be sorted by them: state and views are turned towards the factors they follow. Moments
    of the devices' optimisers thus stay of use, which is worth more than new ones. Memory: the factors of one module of all
    devices.
    """

    name = "flexlora"
    additive = False
    printed = False

    def view(self, state: AdapterState, rank: int, seed_text: str = "") -> AdapterState:
        """The best approximation of `rank` for each module, as close to its first rows and columns as can be."""
        check_rank(state, rank)
        result = dict(state)
        for place in places(state):
            a, b = factors(state, place)
            if rank < len(a):
                nearest = best(b, a, b[:, :rank], a[:rank])
                result[AdapterKey(*place, "B")], result[AdapterKey(*place, "A")] = nearest
        return result

    def merge(self, state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        head = [key for key in self.trained(state) if key.layer == HEAD]
        result = self.averaged(state, updates, weights, head)
        bases = Bases()
        for place in places(state):
            a, b = factors(state, place)
            product = self._product(state, place, updates, weights, bases).factors()
            result[AdapterKey(*place, "B")], result[AdapterKey(*place, "A")] = best(*product, b, a)
        return result

    def _product(
        self, state: AdapterState, place: Place, updates: Sequence[Update], weights: Mapping[str, float], bases: Bases
    ) -> Stack:
        """B A + sum w_k [dB_k A_k + B_k^0 dA_k], with one product for all devices that have the same B_k^0."""
        a, b = factors(state, place)
        product = Stack(len(b), a.shape[1])
        kept = 1 - sum(weights[update.device] for update in updates) if self.printed else 1.0
        product.add(kept * b, a)
        changes: dict[tuple[int, int], Exact] = {}
        lefts = {}
        for update in by_device(updates):
            weight, start = weights[update.device], (update.version, update.rank)
            da, db = factors(self.delta(state, update, [AdapterKey(*place, part) for part in ("A", "B")]), place)
            base_a, lefts[start] = factors(bases.of(update), place)
            product.add(weight * db, base_a + da)
            change = da.astype(np.float64) + (base_a if self.printed else 0.0)
            changes[start] = changes.get(start, 0.0) + weight * change
        for start in sorted(changes):
            product.add(lefts[start], changes[start])
        return product


class FlexLoraPrinted(FlexLora):
    """FlexLoRA as published: the mean of the products whatever their ranks, (1 - s) B A + sum w_k B_k A_k."""

    name = "flexlora-printed"
    printed = True
