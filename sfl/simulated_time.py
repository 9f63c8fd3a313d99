"""Time in a simulation: how fast who is, what time it is for whom, and what is under way."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class DeviceSpeed:
    """How fast a device is, in simulated time: seconds of a local step with its edge, and its link to the federation server.

    A batch of a local validation takes a third of a step, as it only goes forward. The evaluation at a run's end takes none: it
    is for figures alone.
    """

    step_s: float = 0.1
    bytes_per_s: float = math.inf
    round_trip_s: float = 0.0

    @property
    def validation_s(self) -> float:
        """Seconds of a batch of a local validation."""
        return self.step_s / 3

    def transfer_s(self, size: int) -> float:
        """Seconds until `size` bytes have gone either way."""
        return self.round_trip_s + size / self.bytes_per_s


class Clock:
    """A device's simulated time, in seconds from the start."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Post:
    """What is under way, whose it is and when it arrives."""

    def __init__(self) -> None:
        self._under_way: list[tuple[float, int, str, Callable[[], None]]] = []
        self._sent = 0  # of two that arrive at once the one that was sent first comes first

    def send(self, arrives: float, sender: str, deliver: Callable[[], None]) -> None:
        """Have `deliver` called at the simulated time `arrives`."""
        self._sent += 1
        heapq.heappush(self._under_way, (arrives, self._sent, sender, deliver))

    @property
    def next_s(self) -> float:
        """When the next one arrives; infinite if nothing is under way."""
        return self._under_way[0][0] if self._under_way else math.inf

    @property
    def next_sender(self) -> str:
        """Whose the next one is; "" if nothing is under way."""
        return self._under_way[0][2] if self._under_way else ""

    def deliver(self) -> None:
        """Deliver the next one. Raises what its receiver raises."""
        heapq.heappop(self._under_way)[3]()
