"""Halves that wait for their other half, and the pool of whole updates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sfl.adapters.state import AdapterState, total
from sfl.errors import RefusedError
from sfl.fed_server.members import Role
from sfl.fed_server.strategies import Update
from sfl.telemetry import log


@dataclass(frozen=True)
class Half:
    """What an update's half says of itself; see `UpdateHeader` in federation.proto."""

    submission: str
    device: str
    half: Role  # whose half this is
    version: int
    examples: int = 0
    steps: int = 0


@dataclass
class _Pending:
    header: Half  # of the half that is there
    state: AdapterState
    since: float


class Pool:
    """Joins halves to updates, and keeps one update for each device until it is drained.

    A submission is known by its device and id; each half of it counts once, for as long as the server runs. Successive
    submissions of a device are successive progress, so their deltas add up in the order in which they became whole.
    """

    def __init__(self, half_expires_s: float, clock: Callable[[], float]) -> None:
        self._half_expires_s = half_expires_s
        self._clock = clock
        self._known: set[tuple[str, str, Role]] = set()
        self._pending: dict[tuple[str, str], _Pending] = {}
        self._updates: dict[str, Update] = {}
        self._submissions: dict[str, int] = {}
        self._since = 0.0

    def knows(self, half: Half) -> bool:
        """Whether this half has arrived before."""
        return (half.device, half.submission, half.half) in self._known

    def add(self, half: Half, state: AdapterState) -> bool:
        """Take a half that is new and was checked; True when it makes a whole update with the one that was there.

        Raises `RefusedError` when the two stem from different versions.
        """
        key = (half.device, half.submission)
        other = self._pending.get(key)
        if other is None:
            self._pending[key] = _Pending(half, state, self._clock())
        elif other.header.version != half.version:
            raise RefusedError(
                f"the {half.half}'s half of submission {half.submission} of device '{half.device}' stems from version"
                f" {half.version}, the other half from {other.header.version}"
            )
        else:
            del self._pending[key]
            header = half if half.half == "device" else other.header
            self._pool(header, state | other.state)
        self._known.add((*key, half.half))
        return other is not None

    def _pool(self, header: Half, delta: AdapterState) -> None:
        device = header.device
        if not self._updates:
            self._since = self._clock()
        self._submissions[device] = self._submissions.get(device, 0) + 1
        update = Update(
            device,
            delta,
            header.version,
            examples=0,  # not known here: see `updates`
            submissions=self._submissions[device],
            trained_on=header.examples,
            steps=header.steps,
        )
        before = self._updates.get(device)
        if before is not None:
            update = dataclasses.replace(
                update,
                delta=total(before.delta, delta),
                version=min(before.version, update.version),
                pooled=before.pooled + 1,
                trained_on=before.trained_on + update.trained_on,
                steps=before.steps + update.steps,
            )
        self._updates[device] = update

    def devices(self) -> set[str]:
        """Devices that have an update in the pool."""
        return set(self._updates)

    def waited_s(self) -> float:
        """Seconds since the first update of the pool."""
        return self._clock() - self._since

    def updates(self, examples: Mapping[str, int]) -> list[Update]:
        """The updates, sorted by device; `examples` is |D_k| of each of these devices now, not when it submitted."""
        return [dataclasses.replace(self._updates[device], examples=examples[device]) for device in sorted(self._updates)]

    def clear(self) -> None:
        """Forget the updates, which have been aggregated; halves stay."""
        self._updates.clear()

    def submissions(self) -> int:
        """Whole submissions so far, of all devices."""
        return sum(self._submissions.values())

    def expire(self) -> list[Half]:
        """Drop halves that have waited too long for their other half; should that half come again, it is new."""
        now = self._clock()
        late = [pending.header for pending in self._pending.values() if now - pending.since > self._half_expires_s]
        for half in late:
            self._drop(half)
        return late

    def drop(self, device: str) -> list[Half]:
        """Drop the halves of a device that wait for their other half."""
        dropped = [pending.header for pending in self._pending.values() if pending.header.device == device]
        for half in dropped:
            self._drop(half)
        return dropped

    def _drop(self, half: Half) -> None:
        del self._pending[(half.device, half.submission)]
        self._known.discard((half.device, half.submission, half.half))
        missing = "edge" if half.half == "device" else "device"
        log.warning("submission %s of device '%s' is lost: its %s half never came", half.submission, half.device, missing)
