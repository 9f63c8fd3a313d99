"""Halves that wait for their other half, and the pool of whole updates. What they hold is on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterKey, AdapterState, require_same_keys
from sfl.errors import AdapterError, BusyError, RefusedError
from sfl.fed_server import half_files
from sfl.fed_server.half_files import HalfFile
from sfl.fed_server.members import Role
from sfl.fed_server.seen import Seen
from sfl.telemetry import log

_MOST_WAITING = 16  # halves that a device, or an edge server for it, has here without the other one
_MOST_WHOLE = 256  # submissions of one device that no version has yet


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
    submission: str
    version: int
    trained_on: int  # examples
    steps: int
    rank: int
    cut: int
    files: tuple[HalfFile, ...]

    def read(self, keys: Collection[AdapterKey] | None = None) -> AdapterState:
        """The tensors named by `keys`, or all. Raises as `HalfFile.read` does."""
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
        """Their sum, of the tensors named by `keys` or all. Raises as `HalfFile.read` does."""
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

    A submission is known by its device and id, and counts once, for ever: `settled` are those of which nothing is left to do,
    as versions hold them or never will. Successive
    submissions of a device are successive progress, so their deltas add up in the order in which they became whole. `accept` is
    called with each new submission once both of its halves are on disk, and may refuse it by raising an error.

    Each half is a file in `folder`, `NUMBER-HALF.safetensors`, numbered in the order of arrival; its metadata are the fields of
    `Half`, with the rank and the cut that the device had. A pool takes up what an earlier one left there, in the same order.
    None of them can stem from a version after `newest`. Without a folder it is a temporary one. Raises `AdapterWriteError` for a
    folder that cannot be used, `OSError` for a half in it that cannot be read for the moment.
    """

    def __init__(
        self,
        folder: Path | None,
        half_expires_s: float,
        clock: Callable[[], float],
        accept: Callable[[Submission], None] = lambda submission: None,
        settled: Iterable[tuple[str, str]] = (),
        newest: int | None = None,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="sfl-pool-") if folder is None else None
        self._folder = folder or Path(self._temporary.name if self._temporary else "")
        self._half_expires_s = half_expires_s
        self._clock = clock
        self._accept = accept
        self._settled = Seen()  # whole submissions
        self._aside = Seen()
        self._pending: dict[tuple[str, str], _Pending] = {}
        self._whole: dict[str, list[Submission]] = {}
        self._submissions: dict[str, int] = {}
        self._since = 0.0
        self._arrived = 0
        for device, submission in settled:
            self._settle(device, submission)
        self._take_up(newest)

    def _take_up(self, newest: int | None) -> None:
        """Take the halves in the folder as if they had just arrived. Damaged files are set aside, and told."""
        for number, file in half_files.found(self._folder):
            self._arrived = number
            try:
                half, rank, cut = _read_about(file.about())
                if newest is not None and half.version > newest:
                    raise AdapterError(f"half an update in {file.path} stems from version {half.version}, which is not there")
            except AdapterError as error:
                log.error("%s", error)
                self._set_aside(file)
                continue
            if self.knows(half):  # it is in a version, or there twice: the server was killed before it deleted the file
                _delete(file)
            else:
                self._take(half, file, rank, cut)

    def _set_aside(self, file: HalfFile) -> None:
        try:
            file.set_aside()
        except OSError as error:
            raise AdapterWriteError(f"updates cannot be kept in {self._folder}: {error}") from error

    def knows(self, half: Half) -> bool:
        """Whether this half has arrived before."""
        key = (half.device, half.submission)
        other = self._pending.get(key)
        return key in self._settled or (other is not None and other.header.half == half.half)

    def waits_for(self, half: Half) -> bool:
        """Whether the other half of the same submission is there."""
        return (half.device, half.submission) in self._pending

    def halves(self) -> set[tuple[str, str]]:
        """Submissions, by device and id, of which one half waits for the other."""
        return set(self._pending)

    def set_aside(self, half: Half) -> bool:
        """Note that a submission is not taken; True for the first of its halves."""
        if (half.device, half.submission) in self._aside:
            return False
        self._aside.add(half.device, half.submission)
        return True

    def add(self, half: Half, state: AdapterState, rank: int, cut: int) -> bool:
        """Take a half that is new and was checked; True when it makes a whole submission with the one that was there.

        Raises `RefusedError` when the two stem from different versions, `BusyError` while as many submissions of the device wait
        for a version as may of one, `AdapterWriteError` when it cannot be kept, and what `accept` raises; nothing has happened
        then.
        """
        key = (half.device, half.submission)
        other = self._pending.get(key)
        if other is None:
            self._require_room(half)
        elif other.header.version != half.version:
            raise RefusedError(
                f"the {half.half}'s half of submission {half.submission} of device '{half.device}' stems from version"
                f" {half.version}, the other half from {other.header.version}"
            )
        path = self._folder / f"{self._arrived + 1:08d}-{half.half}{half_files.SUFFIX}"
        file = half_files.write(path, state, {**vars(half), "rank": rank, "cut": cut}, lasting=self._temporary is None)
        if other is not None:
            try:
                self._accept(_submission(half, file, other, rank, cut))
            except Exception:
                _delete(file)
                raise
        self._arrived += 1
        return self._take(half, file, rank, cut)

    def _require_room(self, half: Half) -> None:
        """What completes a submission is never held up by this."""
        whole = len(self._whole.get(half.device, ()))
        if whole >= _MOST_WHOLE:
            raise BusyError(
                f"{whole} submissions of device '{half.device}' wait for the next version: no more are taken until that is made"
            )

    def _take(self, half: Half, file: HalfFile, rank: int, cut: int) -> bool:
        key = (half.device, half.submission)
        other = self._pending.pop(key, None)
        if other is None:
            self._pending[key] = _Pending(half, file, self._clock())
            return False
        if not self._whole:
            self._since = self._clock()
        self._whole.setdefault(half.device, []).append(_submission(half, file, other, rank, cut))
        self._settle(*key)
        return True

    def _settle(self, device: str, submission: str) -> None:
        self._settled.add(device, submission)
        self._submissions[device] = self._submissions.get(device, 0) + 1

    def counts(self) -> dict[str, int]:
        """Submissions in the pool, by device."""
        return {device: len(submissions) for device, submissions in list(self._whole.items())}

    def whole(self) -> list[Submission]:
        """The submissions in the pool, by device and in order."""
        return [submission for device in sorted(self._whole) for submission in self._whole[device]]

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
                _delete(*submission.files)
        self._since = self._clock()

    def clear(self) -> list[Submission]:
        """Forget all submissions in the pool, which are in no version and never will be; halves stay."""
        left = self.whole()
        self._whole = {}
        for submission in left:
            _delete(*submission.files)
        return left

    def ever(self) -> dict[str, int]:
        """Whole submissions so far, by device."""
        return dict(self._submissions)

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

    def crowded_out(self, by: Half) -> list[Half]:
        """Drop the oldest of a device's halves that wait, those of one side, where there are too many with `by`.

        They are what is given up, and not the new one: a device whose edge server is cut off for long trains on, and what waits
        longest is the least likely to become whole.
        """
        waiting = [
            each.header for each in self._pending.values() if (each.header.device, each.header.half) == (by.device, by.half)
        ]
        dropped = waiting[: max(0, len(waiting) - _MOST_WAITING)]
        for half in dropped:
            self._drop(half)
        return dropped

    def drop(self, device: str) -> list[Half]:
        """Drop the halves of a device that wait for their other half."""
        dropped = [pending.header for pending in self._pending.values() if pending.header.device == device]
        for half in dropped:
            self._drop(half)
        return dropped

    def _drop(self, half: Half) -> None:
        _delete(self._pending.pop((half.device, half.submission)).file)
        missing = "edge" if half.half == "device" else "device"
        log.warning("submission %s of device '%s' is given up: its %s half has not come", half.submission, half.device, missing)


def _submission(half: Half, file: HalfFile, other: _Pending, rank: int, cut: int) -> Submission:
    """The whole of a half that has come and the one that was there; what a device says of it counts."""
    said, files = (half, (file, other.file)) if half.half == "device" else (other.header, (other.file, file))
    return Submission(half.device, half.submission, half.version, said.examples, said.steps, rank, cut, files)


def _read_about(about: Mapping[str, str]) -> tuple[Half, int, int]:
    """What `Pool.add` wrote of a half: itself, rank and cut. Raises `AdapterError` when it is not that."""
    try:
        half = Half(
            about["submission"],
            about["device"],
            "device" if about["half"] == "device" else "edge",
            *(int(about[name]) for name in ("version", "examples", "steps", "failures")),
            *(None if about[name] == "None" else float(about[name]) for name in ("bytes_per_s", "round_trip_s")),
        )
        return half, int(about["rank"]), int(about["cut"])
    except (KeyError, ValueError) as error:
        raise AdapterError(f"half an update says too little of itself: {error!r}") from error


def _delete(*files: HalfFile) -> None:
    """Delete what nothing needs any more; what was found to be damaged is set aside."""
    for file in files:
        try:
            if file.damaged:
                file.set_aside()
            else:
                file.delete()
        except OSError as error:
            log.warning("%s cannot be deleted, though nothing needs it any more: %s", file.path, error)
