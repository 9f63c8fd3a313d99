"""What one device has learnt, as strategies, merges, robust rules and privacy see it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from sfl.adapters.state import AdapterKey, AdapterState, norm, scaled
from sfl.errors import AdapterError, UpdateError

Read = Callable[[Collection[AdapterKey] | None], AdapterState]


@dataclass(frozen=True)
class Update:
    """What one device has learnt since the last aggregation: delta theta_k of a whole adapter, both halves together.

    The tensors are read when they are asked for, so a thousand updates take no more memory than those that are held at once.
    """

    device: str
    version: int  # the oldest global version that one of its submissions stems from
    examples: int  # |D_k|, the training examples on the device
    submissions: int  # that the device ever made, these included
    pooled: int  # submissions that this update is the sum of
    trained_on: int  # examples, by the steps below
    steps: int  # local steps that made it
    rank: int  # of its factors
    cut: int  # the device's cut layer
    lag: int  # newest version - version, at the aggregation
    read: Read  # the tensors named, or all for None, as `delta` gives them
    base: Callable[[], AdapterState]  # the view of `version` that the device had: trained factors at its rank, frozen ones, head

    def delta(self, keys: Collection[AdapterKey] | None = None) -> AdapterState:
        """delta theta_k, the sum of its submissions, float32; of the tensors named by `keys` alone, those that it has.

        Nobody may change the arrays: they are the pool's own, mapped from its files. Parts that are not trained are absent:
        frozen factors, and A under FFA. Raises `UpdateError` when the pool's files are missing, damaged or not to be read,
        `OSError` when that is so for the moment.
        """
        try:
            return self.read(keys)
        except AdapterError as error:
            raise UpdateError(self.device, str(error)) from error

    def norm(self) -> float:
        """||delta theta_k||_2 over all its tensors. Raises as `delta` does."""
        return norm(self.delta())

    def scaled(self, factor: float) -> Update:
        """The same update with its delta times `factor`."""
        return self.changed(lambda delta: scaled(delta, factor))

    def changed(self, change: Callable[[AdapterState], AdapterState]) -> Update:
        """The same update with `change`, which treats each tensor by itself, applied to what is read, anew at each reading."""
        return dataclasses.replace(self, read=lambda keys: change(self.read(keys)))

    def holding(self, delta: AdapterState) -> Update:
        """The same update with another `delta`, which stays in memory."""

        def read(keys: Collection[AdapterKey] | None) -> AdapterState:
            return {key: value for key, value in delta.items() if keys is None or key in keys}

        return dataclasses.replace(self, read=read)


def by_device(updates: Iterable[Update]) -> list[Update]:
    """Sorted by the devices' names, so that sums do not depend on who came first."""
    return sorted(updates, key=lambda update: update.device)
