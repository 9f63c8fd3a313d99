"""Frozen factors: how products are added to them, and how they stay within full rank."""

from __future__ import annotations

import numpy as np

from sfl.adapters.state import FROZEN_A, FROZEN_B, AdapterKey, AdapterState, Array
from sfl.fed_server.merges.base import Place
from sfl.fed_server.merges.factors import Exact, compress


def freeze(state: AdapterState, place: Place, left: Array | Exact, right: Array | Exact) -> None:
    """Add `left @ right` (out x m, m x in) to the frozen factors of a module in `state`, whose arrays are replaced.

    Products are put side by side. Where that takes more than min(out, in) of them, the whole is factored anew by its
    singular values, which is exact at that rank.
    """
    key_a, key_b = AdapterKey(*place, FROZEN_A), AdapterKey(*place, FROZEN_B)
    if key_a in state:
        left, right = np.concatenate([state[key_b], left], axis=1), np.concatenate([state[key_a], right], axis=0)
    if left.shape[1] > min(left.shape[0], right.shape[1]):
        left, right = compress(left, right)
    if left.shape[1]:
        state[key_b] = np.ascontiguousarray(left, dtype=np.float32)
        state[key_a] = np.ascontiguousarray(right, dtype=np.float32)
