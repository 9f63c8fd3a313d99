"""The seam of the merges: how updates become the next state, and what of a state a device of some rank gets."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState, Array, trained_part
from sfl.errors import AdapterError, UpdateError
from sfl.fed_server.updates import Update, by_device

Place = tuple[int, str]  # block index and module inside the block


class Merge(ABC):
    """How the updates of devices become the next global adapter. Knows no settings, clocks or files, and keeps no state.

    W is what a block module's trained and frozen factors add to its base, without the common scale: B A + frozen_B frozen_A.
    A_k = A_k^0 + dA_k and B_k = B_k^0 + dB_k are the factors that device k ended with, A_k^0 and B_k^0 those of its view of the
    version that its update stems from. Of several submissions on one version that fell into different pools, a later one's
    A_k and B_k lack what the earlier ones held, which the server has no more; so of its progress B_k A_k - B_k^0 A_k^0 the
    products of later with earlier steps are left out.
    """

    name: ClassVar[str]
    frozen_parts: ClassVar[tuple[str, ...]] = ()  # factors that devices do not train and updates do not hold
    additive: ClassVar[bool]  # whether progress in factors can be added to the factors of any later version
    fresh_optimizer: ClassVar[bool] = False  # whether devices begin each version with new moments

    def view(self, state: AdapterState, rank: int, seed_text: str = "") -> AdapterState:
        """What a device of `rank` gets of a version: trained factors of that rank, frozen factors and head as they are.

        `seed_text` names the version, for merges that draw something anew. Here the first `rank` rows of A and columns of B.
        Raises `AdapterError` for a rank that is less than 1 or more than the state's.
        """
        check_rank(state, rank)
        return {key: np.ascontiguousarray(value[trained_part(key, rank)]) for key, value in state.items()}

    @abstractmethod
    def merge(self, state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        """The next state from `state`, the newest, and `updates` with their weights, by device. Changes nothing in place.

        The weights are positive or zero, with a sum of at most 1. The result is the same, to the bit, in whatever order the
        updates are given. Raises `AdapterError` for weights that are no shares of one, and `UpdateError` for an update that
        cannot be read or has other tensors than it should.
        """

    def averaged(
        self,
        state: AdapterState,
        updates: Sequence[Update],
        weights: Mapping[str, float],
        keys: Collection[AdapterKey] | None = None,
    ) -> AdapterState:
        """theta + sum of w_k * delta theta_k, float32, of the tensors `keys` or all that are trained; the others as they are.

        An update of a smaller rank is padded with zeros: what a device does not hold stays as it is. One update is in memory
        at a time.
        """
        check_weights(updates, weights)
        chosen = frozenset(self.trained(state) if keys is None else keys)
        result = dict(state)
        result.update({key: state[key].copy() for key in chosen})
        # Room for the products, once for all updates.
        product = {shape: np.empty(shape, np.float32) for shape in {result[key].shape for key in chosen}}
        sums: dict[int, list[tuple[AdapterKey, Array, Array]]] = {}  # by rank: where a tensor's values go, and its product
        for update in by_device(updates):
            if update.rank not in sums:
                parts = [(key, result[key], trained_part(key, update.rank)) for key in sorted(chosen)]
                sums[update.rank] = [(key, whole[part], product[whole.shape][part]) for key, whole, part in parts]
            delta, weight = update.delta(chosen), np.float32(weights[update.device])
            for key, into, room in sums[update.rank]:
                into += np.multiply(_fitting(delta, key, into.shape, update), weight, out=room)
        return result

    def trained(self, state: Iterable[AdapterKey]) -> list[AdapterKey]:
        """The tensors that updates hold, sorted: all but frozen factors and frozen parts."""
        frozen = (FROZEN_A, FROZEN_B, *self.frozen_parts)
        return sorted(key for key in state if key.layer == HEAD or key.part not in frozen)

    def delta(self, state: AdapterState, update: Update, keys: Collection[AdapterKey]) -> AdapterState:
        """The tensors `keys` of an update. Raises `UpdateError` when one is missing or has another shape than its rank says."""
        delta = update.delta(keys)
        for key in keys:
            _fitting(delta, key, state[key][trained_part(key, update.rank)].shape, update)
        return delta


def _fitting(delta: AdapterState, key: AdapterKey, shape: tuple[int, ...], update: Update) -> Array:
    """The tensor `key` of an update. Raises `UpdateError` when it is missing or has another shape."""
    value = delta.get(key)
    if value is None or value.shape != shape:
        found = "is missing" if value is None else f"has shape {value.shape}"
        reason = f"adapter tensor {key} {found} in the update of device '{update.device}', expected {shape} at rank {update.rank}"
        raise UpdateError(update.device, reason)
    return value


class Bases:
    """What devices started from, read once for each version and rank."""

    def __init__(self) -> None:
        self._read: dict[tuple[int, int], AdapterState] = {}

    def of(self, update: Update) -> AdapterState:
        """The view of `update.version` that a device of its rank had. Raises `UpdateError` when it cannot be read any more."""
        key = (update.version, update.rank)
        if key not in self._read:
            try:
                self._read[key] = update.base()
            except AdapterError as error:
                raise UpdateError(update.device, str(error)) from error
        return self._read[key]


def places(state: Iterable[AdapterKey]) -> list[Place]:
    """The modules that have LoRA, sorted."""
    return sorted({(key.layer, key.module) for key in state if key.layer != HEAD and key.part == "B"})


def factors(state: Mapping[AdapterKey, Array], place: Place) -> tuple[Array, Array]:
    """A (r x in) and B (out x r) of a module."""
    return state[AdapterKey(*place, "A")], state[AdapterKey(*place, "B")]


def check_weights(updates: Sequence[Update], weights: Mapping[str, float]) -> None:
    """Raise `AdapterError` unless the updates' weights are finite, not negative and at most 1 together."""
    values = [weights[update.device] for update in updates]
    if not all(math.isfinite(value) and value >= 0 for value in values) or sum(values) > 1 + 1e-9:
        raise AdapterError(f"the weights {dict(weights)} are not shares of one")


def check_rank(state: Mapping[AdapterKey, Array], rank: int) -> None:
    """Raise `AdapterError` unless a view of `rank` can be had of `state`."""
    whole = min((len(value) for key, value in state.items() if key.layer != HEAD and key.part == "A"), default=rank)
    if not 1 <= rank <= whole:
        raise AdapterError(f"no device can have rank {rank}: the federation's LoRA rank is {whole}")
