"""Halves that wait for their other half, and the pool of whole updates. What they hold is on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import get_args

from sfl.adapters.state import AdapterKey, AdapterState, require_same_keys
from sfl.errors import RefusedError
from sfl.fed_server import half_files
from sfl.fed_server.half_files import HalfFile
from sfl.fed_server.members import Role
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
    failures: int = 0  # tries of this upload that failed before this one
    bytes_per_s: float | None = None  # of the device's link, as it measured it
    round_trip_s: float | None = None


@dataclass(frozen=True)
class Submission:
    """A whole update of one device, in two files."""

    device: str
    version: int
    trained_on: int  # examples
    steps: int
    rank: int
    cut: int
    files: tuple[HalfFile, ...]

    def read(self, keys: Collection[AdapterKey] | None = None) -> AdapterState:
        """The tensors named by `keys`, or all. Raises `AdapterError` when a file cannot be read."""
        return {key: value for file in self.files for key, value in file.read(keys).items()}


@dataclass(frozen=True)
class Pooled:
    """The submissions of one device that make its update, in the order in which they became whole; see `Pool.take`."""

    submissions: tuple[Submission, ...]
    ever: int  # submissions of this device so far, these included

    @property
    def first(self) -> Submission:
        return self.submissions[0]

    def read(self, keys: Collection[AdapterKey] | None = None) -> AdapterState:
        """Their sum, of the tensors named by `keys` or all. Raises `AdapterError` when a file cannot be read."""
        result = self.first.read(keys)
        for submission in self.submissions[1:]:
            more = submission.read(keys)
            require_same_keys(more, result)
            result = {key: value + more[key] for key, value in result.items()}
        return result


@dataclass
class _Pending:
    header: Half  # of the half that is there
    file: HalfFile
    since: float


class Pool:
    """Joins halves to whole submissions, and keeps these until they are drained.

    A submission is known by its device and id; each half of it counts once, for as long as the server runs. Successive
    submissions of a device are successive progress, so their deltas add up in the order in which they became whole.

    Each half is a file in `folder`, `NUMBER-HALF.safetensors`, numbered in the order of arrival; its metadata are the fields of
    `Half`, with the rank and the cut that the device had. So a server could take the pool up again by adding them in that
    order. As yet it does not, and what an earlier one left is deleted. Without a folder it is a temporary one.
    Raises `AdapterWriteError` for a folder that cannot be used.
    """

    def __init__(self, folder: Path | None, half_expires_s: float, clock: Callable[[], float]) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="sfl-pool-") if folder is None else None
        self._folder = folder or Path(self._temporary.name if self._temporary else "")
        self._half_expires_s = half_expires_s
        self._clock = clock
        self._known: set[tuple[str, str, Role]] = set()
        self._pending: dict[tuple[str, str], _Pending] = {}
        self._whole: dict[str, list[Submission]] = {}
        self._submissions: dict[str, int] = {}
        self._since = 0.0
        self._arrived = 0
        if left := half_files.sweep(self._folder):
            log.warning("%d halves of updates that an earlier server had not aggregated are deleted from %s", left, self._folder)

    def knows(self, half: Half) -> bool:
        """Whether this half has arrived before."""
        return (half.device, half.submission, half.half) in self._known

    def waits_for(self, half: Half) -> bool:
        """Whether the other half of the same submission is there."""
        return (half.device, half.submission) in self._pending

    def set_aside(self, half: Half) -> bool:
        """Know a half without taking it; True for the first one of its submission."""
        self._known.add((half.device, half.submission, half.half))
        return len(self._known & {(half.device, half.submission, role) for role in get_args(Role)}) == 1

    def add(self, half: Half, state: AdapterState, rank: int, cut: int) -> bool:
        """Take a half that is new and was checked; True when it makes a whole submission with the one that was there.

        Raises `RefusedError` when the two stem from different versions, `AdapterWriteError` when it cannot be kept; nothing
        has happened then.
        """
        key = (half.device, half.submission)
        other = self._pending.get(key)
        if other is not None and other.header.version != half.version:
            raise RefusedError(
                f"the {half.half}'s half of submission {half.submission} of device '{half.device}' stems from version"
                f" {half.version}, the other half from {other.header.version}"
            )
        path = self._folder / f"{self._arrived + 1:08d}-{half.half}{half_files.SUFFIX}"
        file = half_files.write(path, state, {**vars(half), "rank": rank, "cut": cut}, lasting=self._temporary is None)
        self._arrived += 1
        self._known.add((*key, half.half))
        if other is None:
            self._pending[key] = _Pending(half, file, self._clock())
            return False
        del self._pending[key]
        said = half if half.half == "device" else other.header
        files = (file, other.file) if half.half == "device" else (other.file, file)
        if not self._whole:
            self._since = self._clock()
        submission = Submission(half.device, half.version, said.examples, said.steps, rank, cut, files)
        self._whole.setdefault(half.device, []).append(submission)
        self._submissions[half.device] = self._submissions.get(half.device, 0) + 1
        return True

    def counts(self) -> dict[str, int]:
        """Submissions in the pool, by device."""
        return {device: len(submissions) for device, submissions in self._whole.items()}

    def versions(self) -> set[int]:
        """The versions that halves and whole updates in the pool stem from."""
        whole = {submission.version for submissions in self._whole.values() for submission in submissions}
        return whole | {pending.header.version for pending in self._pending.values()}

    def waited_s(self) -> float:
        """Seconds since the first update of the pool."""
        return self._clock() - self._since

    def take(self, mix_versions: bool) -> list[Pooled]:
        """The update of each device, sorted by device: its submissions up to the first that cannot be added to those before.

        That is one of another rank or cut (the device had joined anew), or, unless `mix_versions`, one that stems from another
        version: where each version has factors of its own, the difference of one's factors means nothing to another's.
        What is left over is for the next aggregation. Nothing leaves the pool before `remove`.
        """

        def kind(submission: Submission) -> tuple[int, int, int]:
            return submission.rank, submission.cut, 0 if mix_versions else submission.version

        pooled = []
        for device in sorted(self._whole):
            found = self._whole[device]
            alike = tuple(takewhile(lambda one, first=found[0]: kind(one) == kind(first), found))  # type: ignore[misc]
            pooled.append(Pooled(alike, self._submissions[device] - len(found) + len(alike)))
        return pooled

    def remove(self, taken: Collection[Pooled]) -> None:
        """Forget what was taken, which has been aggregated or never will be; halves stay."""
        for pooled in taken:
            device = pooled.first.device
            self._whole[device] = self._whole[device][len(pooled.submissions) :]
            if not self._whole[device]:
                del self._whole[device]
            for submission in pooled.submissions:
                for file in submission.files:
                    _delete(file)
        self._since = self._clock()

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
        _delete(self._pending.pop((half.device, half.submission)).file)
        self._known.discard((half.device, half.submission, half.half))
        missing = "edge" if half.half == "device" else "device"
        log.warning("submission %s of device '%s' is lost: its %s half never came", half.submission, half.device, missing)


def _delete(file: HalfFile) -> None:
    try:
        file.delete()
    except OSError as error:
        log.warning("%s cannot be deleted, though nothing needs it any more: %s", file.path, error)
