"""FedOpt (Reddi et al. 2021) and FedAvgM (Hsu et al. 2019): rounds, with an optimiser at the server.

With g = merged - theta, the weighted sum of the updates, in place of a gradient. The GSFS paper prints a minus in its
equation 6; as g is progress already, the step is added. All of it is done tensor by tensor, and value by value.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import numpy as np

from sfl.adapters.state import FROZEN_A, FROZEN_B, AdapterState, Array, require_same_keys
from sfl.errors import AdapterError
from sfl.fed_server.strategies.base import Moments, Rounds


class ServerOptimiser(Rounds):
    """FedAvg's rounds, and theta <- theta + eta * direction(g). What a merge freezes is taken as the merge made it."""

    moment_names: ClassVar[tuple[str, ...]]

    def check_moments(self, moments: Moments, state: AdapterState) -> None:
        expected = {key: value for key, value in state.items() if key.part not in (FROZEN_A, FROZEN_B)}
        if moments and moments.keys() != set(self.moment_names):
            raise AdapterError(f"it has the moments {', '.join(sorted(moments))}, expected {', '.join(self.moment_names)}")
        for moment in moments.values():
            require_same_keys(moment, expected)

    def apply(self, state: AdapterState, merged: AdapterState, moments: Moments) -> tuple[AdapterState, Moments]:
        result: AdapterState = {}
        after: Moments = {name: {} for name in self.moment_names}
        for key, value in merged.items():
            if key.part in (FROZEN_A, FROZEN_B):
                result[key] = value
                continue
            progress = value - state[key]
            before = tuple(moments[name][key] if moments else self.start(name, progress) for name in self.moment_names)
            direction, following = self.direction(progress, before)
            result[key] = state[key] + np.float32(self.settings.server_rate) * direction
            for name, moment in zip(self.moment_names, following):
                after[name][key] = moment
        return result, after

    def start(self, moment: str, progress: Array) -> Array:
        """A moment before the first version."""
        return np.zeros_like(progress)

    @abstractmethod
    def direction(self, progress: Array, moments: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        """Where to go, float32 and of the shape of `progress`, and the moments after it."""


class FedAvgM(ServerOptimiser):
    """v <- beta v + g, theta <- theta + eta v (Hsu et al. 2019, equation 2).

    A progress that stays the same is followed at eta / (1 - beta) times its own pace; the default eta makes that 1.
    """

    moment_names = ("v",)

    def direction(self, progress: Array, moments: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        moved = np.float32(self.settings.server_momentum) * moments[0] + progress
        return moved, (moved,)


class Adaptive(ServerOptimiser):
    """m <- b1 m + (1 - b1) g, theta <- theta + eta m / (sqrt(v) + tau), v beginning at tau^2 (Reddi et al. 2021, algorithm 2)."""

    moment_names = ("m", "v")

    def start(self, moment: str, progress: Array) -> Array:
        return np.full_like(progress, self.settings.server_tau**2 if moment == "v" else 0.0)

    def direction(self, progress: Array, moments: tuple[Array, ...]) -> tuple[Array, tuple[Array, ...]]:
        first, second = moments
        beta = np.float32(self.settings.server_momentum)
        first = beta * first + (1 - beta) * progress
        second = self.second(second, progress * progress)
        return first / (np.sqrt(second) + np.float32(self.settings.server_tau)), (first, second)

    @abstractmethod
    def second(self, moment: Array, square: Array) -> Array:
        """The second moment v after g^2."""


class FedAdam(Adaptive):
    """v <- b2 v + (1 - b2) g^2."""

    def second(self, moment: Array, square: Array) -> Array:
        beta = np.float32(self.settings.server_second_momentum)
        result: Array = beta * moment + (1 - beta) * square
        return result


class FedYogi(Adaptive):
    """v <- v - (1 - b2) g^2 sign(v - g^2)."""

    def second(self, moment: Array, square: Array) -> Array:
        beta = np.float32(self.settings.server_second_momentum)
        result: Array = moment - (1 - beta) * square * np.sign(moment - square)
        return result


class FedAdagrad(Adaptive):
    """v <- v + g^2."""

    def second(self, moment: Array, square: Array) -> Array:
        return moment + square
