"""The seam between the coordinator and a strategy: when the pool is due, what each update weighs, what becomes of their sum."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import ClassVar

from sfl.adapters.state import AdapterState
from sfl.errors import AdapterError
from sfl.fed_server.updates import Update
from sfl.federation_settings import StrategySettings
from sfl.v1 import federation_pb2 as pb

Moments = dict[str, AdapterState]  # of a server optimiser, by name


@dataclass(frozen=True)
class Standing:
    """The pool and who is there, when a strategy is asked whether to aggregate."""

    pooled: Mapping[str, int]  # submissions in the pool, not empty, by device
    present: Mapping[str, int]  # |D_k| of each device that is there and not done
    missing: int = 0  # more devices that are expected to join yet
    waited_s: float = 0.0  # since the first update of this pool
    unreachable: AbstractSet[str] = frozenset()  # of those present: see `Reach`

    def complete(self) -> bool:
        """Whether every device that is present or yet to join is in the pool."""
        return not self.missing and self.present.keys() <= self.pooled.keys()


class Strategy(ABC):
    """Decides when the pool becomes a new version and how. Knows nothing of gRPC, clocks or files, and keeps no state.

    Staleness: an update that is `lag` versions behind weighs (1 + lag) ** -staleness times what it would weigh, and what it
    loses goes to nobody: the version changes by that much less. With a staleness of 0 it counts in full.
    """

    waits: ClassVar[bool] = False  # whether a device that has uploaded waits for the next version
    shared_edge_adapter: ClassVar[bool] = False  # one edge half for all: devices of one rank, and one edge server

    def __init__(self, settings: StrategySettings) -> None:
        self.settings = settings

    @property
    def final(self) -> bool:
        """Whether what is in the pool when the last device has left is aggregated, too."""
        return self.settings.final_upload

    def policy(self, size: float = 1.0) -> pb.UploadPolicy:
        """When a device uploads, and how it trains; `size` are its training examples over the mean of all devices."""
        policy = pb.UploadPolicy(
            keep_progress=self.settings.keep_progress,
            final_upload=self.settings.final_upload,
            proximal=self.settings.proximal,
        )
        policy.MergeFrom(self._rule(size))
        return policy

    @abstractmethod
    def _rule(self, size: float) -> pb.UploadPolicy:
        """The part of the policy that is this strategy's own."""

    @abstractmethod
    def due(self, standing: Standing) -> bool:
        """Whether the pool is to be aggregated now."""

    def least_updates(self, devices: int) -> int:
        """Of how many of so many devices, with as many examples each, updates make a version."""
        return devices

    def weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        """The weight of each update, by device: positive or zero, with a sum of at most 1.

        `population` are the training examples of all devices that take part or have done so to their end, in the pool or not.
        """
        exponent = self.settings.staleness
        stale = {update.device: (1 + update.lag) ** -exponent for update in updates}
        return {device: weight * stale[device] for device, weight in self._weights(updates, population).items()}

    @abstractmethod
    def _weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        """The weights before staleness."""

    def check_moments(self, moments: Moments, state: AdapterState) -> None:
        """Raise `AdapterError` unless `moments` can belong to `state`."""
        if moments:
            raise AdapterError(f"it has the moments {', '.join(sorted(moments))}, and {self.settings.name} has none")

    def prepare(self, updates: Sequence[Update], weights: Mapping[str, float]) -> list[Update]:
        """The updates as they are to be merged under these weights."""
        return list(updates)

    def apply(self, state: AdapterState, merged: AdapterState, moments: Moments) -> tuple[AdapterState, Moments]:
        """The next version from `state`, the newest, and `merged`, what the updates make of it; with its moments.

        `moments` are those of the newest version, empty before the first one. Nothing is changed in place.
        """
        return merged, {}


class Rounds(Strategy):
    """Synchronous rounds: devices upload every `local_steps` steps and wait for the next version; |D_k| / |D| of the pool.

    A round is due when every device that is present or yet to join is in the pool, or `round_timeout_s` seconds after its
    first update.
    """

    waits = True

    def _rule(self, size: float) -> pb.UploadPolicy:
        rounds = pb.Periodic(local_steps=self.settings.local_steps, round_timeout_s=self.settings.round_timeout_s)
        return pb.UploadPolicy(periodic=rounds)

    def due(self, standing: Standing) -> bool:
        return standing.complete() or standing.waited_s >= self.settings.round_timeout_s

    def _weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        return shares({update.device: update.examples for update in updates})


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's share of their sum; equal ones when that is zero."""
    whole = sum(values[device] for device in sorted(values))
    return {device: value / whole if whole > 0 else 1 / len(values) for device, value in values.items()}
