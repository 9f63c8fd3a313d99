"""What attackers do to the update they submit; what they do to their data is no part of this."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sfl.adapters.state import AdapterState

Attack = Callable[[AdapterState], AdapterState]


def sign_flip(factor: float = 1.0) -> Attack:
    """The opposite of what was learnt, `factor` times."""
    return lambda delta: {key: np.float32(-factor) * value for key, value in delta.items()}


def scaling(factor: float = 100.0) -> Attack:
    """What was learnt, `factor` times (model replacement, Bagdasaryan et al. 2020)."""
    return lambda delta: {key: np.float32(factor) * value for key, value in delta.items()}


def gaussian(deviation: float = 30.0, seed: int = 0) -> Attack:
    """Noise of that standard deviation instead of what was learnt."""

    def attack(delta: AdapterState) -> AdapterState:
        rng = np.random.default_rng(seed)
        return {key: (deviation * rng.standard_normal(value.shape)).astype(np.float32) for key, value in sorted(delta.items())}

    return attack
