"""The seam between the coordinator and a strategy: what is pooled, when it is due, and what becomes of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from sfl.adapters.state import AdapterState, require_same_keys
from sfl.errors import AdapterError
from sfl.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Update:
    """What one device has learnt since the last aggregation: delta theta_k of a whole adapter, both halves together.

    `delta` sums the `pooled` submissions it consists of, which `steps` local steps on `trained_on` examples made;
    `version` is the oldest global version that one of them stems from. `examples` is |D_k|, the training examples on the
    device; `submissions` counts all that the device ever made, these included.
    """

    device: str
    delta: AdapterState
    version: int
    examples: int
    submissions: int
    pooled: int = 1
    trained_on: int = 0
    steps: int = 0


class Strategy(ABC):
    """Decides when the pool becomes a new version and how. Knows nothing of gRPC, clocks or files.

    An update that stems from an older version than the newest counts in full, like any other.
    """

    final: bool  # whether what is in the pool when the last device has left is aggregated, too

    @abstractmethod
    def policy(self) -> pb.UploadPolicy:
        """When devices upload."""

    @abstractmethod
    def due(self, pooled: AbstractSet[str], present: AbstractSet[str], missing: int, waited_s: float) -> bool:
        """Whether the pool, not empty, is to be aggregated now.

        `pooled` are the devices with an update in the pool, `present` those that are there and not done; `missing`
        more are expected to join yet and count as present. `waited_s` are the seconds since the first update of this pool.
        """

    @abstractmethod
    def weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        """The weight of each update, by device: positive or zero, with a sum of at most 1.

        `population` are the training examples of all devices that take part or have done so to their end, in the pool or not.
        """

    def aggregate(self, state: AdapterState, updates: Sequence[Update], population: int) -> tuple[AdapterState, dict[str, float]]:
        """The next global adapter, and the weight that each device's update had in it."""
        weights = self.weights(updates, population)
        return weighted_sum(state, updates, weights), weights


def weighted_sum(state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
    """theta + sum over k of a_k * delta theta_k, in float32, in the order of the devices' names.

    So the result is the same, to the bit, in whatever order the updates arrived. Raises `AdapterError` when the weights are
    not finite, negative or more than 1 together, or an update has other tensors than `state`.
    """
    values = [weights[update.device] for update in updates]
    if not all(math.isfinite(value) and value >= 0 for value in values) or sum(values) > 1 + 1e-9:
        raise AdapterError(f"the weights {dict(weights)} are not shares of one")
    result = {key: value.copy() for key, value in state.items()}
    for update in sorted(updates, key=lambda update: update.device):
        require_same_keys(update.delta, state)
        for key, value in result.items():
            value += weights[update.device] * update.delta[key]
    return result


def shares(values: Mapping[str, float]) -> dict[str, float]:
    """Each value's share of their sum; equal ones when that is zero."""
    whole = sum(values[device] for device in sorted(values))
    return {device: value / whole if whole > 0 else 1 / len(values) for device, value in values.items()}
