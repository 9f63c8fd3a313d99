"""FLoRA (Wang et al. 2024): devices' factors are stacked, and training begins anew with every version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from sfl.adapters.state import HEAD, AdapterKey, AdapterState, Array
from sfl.fed_server.merges.base import Bases, Merge, check_rank, factors, places
from sfl.fed_server.merges.factors import Stack
from sfl.fed_server.merges.frozen import freeze
from sfl.fed_server.updates import Update, by_device


class Flora(Merge):
    """W' = W + sum w_k B_k A_k, all of it in the frozen factors: [frozen_B, w_1 B_1, ...] [frozen_A; A_1; ...].

    Exact for any ranks: devices begin with B_k^0 = 0 and a new A_k^0, and hold all of W, whatever their rank. The state's own A
    stays as it is and its B zero; trained factors that another merge has left are frozen first. Memory: the factors of one
    module of all devices.
    """

    name = "flora"
    additive = False
    fresh_optimizer = True

    def view(self, state: AdapterState, rank: int, seed_text: str = "") -> AdapterState:
        """Frozen factors and head as they are, B zero, and A drawn from `seed_text` and its key, of one draw for all ranks."""
        check_rank(state, rank)
        result = _frozen(state)
        for place in places(state):
            key_a, key_b = AdapterKey(*place, "A"), AdapterKey(*place, "B")
            result[key_a] = _kaiming(state[key_a].shape, f"{seed_text}/{key_a}")[:rank]
            result[key_b] = np.zeros((len(state[key_b]), rank), np.float32)
        return result

    def merge(self, state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        head = [key for key in self.trained(state) if key.layer == HEAD]
        result = _frozen(self.averaged(state, updates, weights, head))
        bases = Bases()
        for place in places(state):
            a, b = factors(state, place)
            stack = Stack(len(b), a.shape[1])
            for update in by_device(updates):
                da, db = factors(self.delta(state, update, [AdapterKey(*place, part) for part in ("A", "B")]), place)
                base_a, _ = factors(bases.of(update), place)
                stack.add(weights[update.device] * db, base_a + da)
            freeze(result, place, *stack.factors())
        return result


def _frozen(state: AdapterState) -> AdapterState:
    """`state` with its trained product in the frozen factors and B zero."""
    result = dict(state)
    for place in places(state):
        a, b = factors(state, place)
        if b.any():
            freeze(result, place, b, a)
            result[AdapterKey(*place, "B")] = np.zeros_like(b)
    return result


def _kaiming(shape: tuple[int, ...], name: str) -> Array:
    """A (rank x in) uniform in +-1/sqrt(in), as version 0 has it, from a generator seeded by `name`."""
    generator = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest(), "little"))
    bound = 1 / math.sqrt(shape[1])
    return generator.uniform(-bound, bound, shape).astype(np.float32)
