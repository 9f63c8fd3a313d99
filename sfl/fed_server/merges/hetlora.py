"""HetLoRA (Cho et al. 2024): ranks of the devices' own, and weights by what their factors amount to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from sfl.adapters.state import HEAD, AdapterKey, AdapterState
from sfl.fed_server.merges.base import Bases, Merge, check_weights, factors, places
from sfl.fed_server.merges.factors import norm
from sfl.fed_server.updates import Update, by_device


class HetLora(Merge):
    """The average with the weights w_k n_k / sum w_j n_j, times sum w_j, where n_k^2 = sum over modules of ||B_k A_k||_F^2.

    B_k A_k are the factors that device k ended with. With equal w_k these are the paper's weights; others, such as
    those by examples or by staleness, count as well. The head has no factors and keeps w_k. Truncation is that of
    the view. The paper's pruning of ranks on devices is not part of it.
    """

    name = "hetlora"
    additive = True

    def merge(self, state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        check_weights(updates, weights)
        trained = self.trained(state)
        head = [key for key in trained if key.layer == HEAD]
        blocks = [key for key in trained if key.layer != HEAD]
        merged = self.averaged(state, updates, weights, head)
        return self.averaged(merged, updates, self._weights(state, updates, weights), blocks)

    def _weights(self, state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> dict[str, float]:
        bases = Bases()
        norms = {update.device: self._norm(state, update, bases.of(update)) for update in by_device(updates)}
        whole = sum(weights[device] for device in norms)
        weighed = {device: weights[device] * size for device, size in norms.items()}
        total = sum(weighed.values())
        if total == 0:  # all factors are still zero
            return {device: weights[device] for device in norms}
        return {device: whole * value / total for device, value in weighed.items()}

    def _norm(self, state: AdapterState, update: Update, base: AdapterState) -> float:
        """n_k, module by module."""
        square = 0.0
        for place in places(state):
            keys = [AdapterKey(*place, part) for part in ("A", "B")]
            da, db = factors(self.delta(state, update, keys), place)
            a, b = factors(base, place)
            square += norm(b + db, a + da) ** 2
        return math.sqrt(square)
