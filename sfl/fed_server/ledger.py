"""The ledger: what the federation server has accepted, and what became of it, line by line in `submissions.jsonl`.

Each line is a JSON object with its `event` and Unix `time`:

- `begin`: the ledger of `federation`, whose newest version was `version` by then (null: none);
- `accepted`: a whole submission, on disk before its second half was acknowledged;
- `version`: which submissions went into a version, and the reasons for those of them that did not count;
- `removed`: the same of a version whose folder is deleted next, as it is so old that nobody needs it; on disk before that;
- `dropped`: a submission, or half of one, that will be in no version, and why;
- `finished`: all devices were done.

Versions and the pool say the same, and decide where the two differ: what a killed server had not written yet, the next one adds.
`check` compares all three.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfl.disk import make_folder, sync
from sfl.errors import StateError, StateInUseError, StateWriteError
from sfl.fed_server import half_files
from sfl.fed_server.contents import Contents, Entry, load
from sfl.fed_server.pool import Half, Submission
from sfl.fed_server.versions import version_numbers
from sfl.telemetry import log

FILE = "submissions.jsonl"

Key = tuple[str, str]  # device and submission


@dataclass
class Past:
    """What a ledger told when it was opened."""

    federation: str | None = None  # None: it is new
    begun: int | None = None  # version that was the newest then
    told: int | None = None  # newest version with a line
    accepted: set[Key] = field(default_factory=set)
    dropped: set[Key] = field(default_factory=set)  # and not accepted afterwards, as what was only half there may be
    removed: set[Key] = field(default_factory=set)  # in versions that are not there any more

    @property
    def settled(self) -> set[Key]:
        """Whole submissions that are in no version that is still there, and never will be."""
        return (self.accepted & self.dropped) | self.removed

    def take(self, line: dict[str, Any]) -> None:
        """Raises `KeyError` or `TypeError` for a line that is none of a ledger's."""
        event = line["event"]
        if event == "begin":
            self.federation, self.begun = str(line["federation"]), line["version"]
        elif event == "version":
            self.told = int(line["version"])
        elif event == "accepted":
            self.accepted.add((line["device"], line["submission"]))
            self.dropped.discard((line["device"], line["submission"]))
        elif event == "dropped":
            self.dropped.add((line["device"], line["submission"]))
        elif event == "removed":
            self.removed.update((device, submission) for device, submission in line["submissions"])


class Ledger:
    """Appends to the ledger in `folder`; without one nothing is kept. The last line is cut off where a killed server had not
    written all of it.

    Raises `StateInUseError` when another server has it open, `StateError` when it is damaged, `StateWriteError` when it cannot be
    written.
    """

    def __init__(self, folder: Path | None) -> None:
        self.past = Past()
        self._path = None if folder is None else folder / FILE
        self._behind: list[bytes] = []  # lines for which there was no room
        if self._path is not None:
            self._open(self._path)

    def _open(self, path: Path) -> None:
        try:
            make_folder(path.parent)
            self._file = path.open("ab", buffering=0)
            sync(path.parent)
        except OSError as error:
            raise StateWriteError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StateInUseError(
                f"another federation server works in {path.parent}: choose another `out` for this one"
            ) from error
        self._end = 0  # of the last whole line
        for line, self._end in _lines(path):
            try:
                self.past.take(line)
            except (KeyError, TypeError) as error:
                raise _damaged(path, repr(error)) from error

    @property
    def where(self) -> str:
        return "nowhere" if self._path is None else str(self._path)

    def begin(self, federation: str, version: int | None) -> None:
        """Open the accounts of a federation. Raises `StateWriteError`."""
        self.past.federation, self.past.begun = federation, version
        self._append([_line("begin", federation=federation, version=version)])

    def accepted(self, submission: Submission) -> None:
        """A submission is whole. Raises `StateWriteError` when the disk does not hold that; then it is not accepted."""
        of = submission
        about = {"version": of.version, "examples": of.trained_on, "steps": of.steps}
        self._append([_line("accepted", device=of.device, submission=of.submission, **about)])

    def published(self, version: int, contents: Contents) -> None:
        """What a version, already on disk, holds."""
        self._note("version", version=version, **_held(contents))

    def removed(self, version: int, contents: Contents | None) -> None:
        """A version that is about to be removed, and what it holds, as far as that is known. Raises `StateWriteError` when the
        disk does not hold that, and what was told before; then it has to stay."""
        self._append([_line("removed", version=version, **_held(contents))])

    def dropped(self, submission: Half | Submission | Key, reason: str) -> None:
        """A submission, or what there is of it, that will be in no version."""
        device, name = submission if isinstance(submission, tuple) else (submission.device, submission.submission)
        self._note("dropped", device=device, submission=name, reason=reason)

    def finished(self, version: int | None) -> None:
        self._note("finished", version=version)

    def catch_up(self) -> None:
        """Write what there was no room for, if there is now."""
        if self._behind:
            self._note()

    def close(self) -> None:
        if self._path is not None:
            self.catch_up()
            self._file.close()

    def _note(self, event: str = "", **fields: Any) -> None:
        """Write a line that nothing waits for: now or, where the disk is full, as soon as it can be."""
        before = len(self._behind)
        lines = [_line(event, **fields)] if event else []
        try:
            self._append(lines)
        except StateWriteError as error:
            self._behind += lines
            if not before:
                log.error("%s; it is tried again", error)

    def _append(self, lines: Iterable[bytes]) -> None:
        """Write these lines after those that were behind, and have the disk hold them."""
        if self._path is None:
            return
        data = b"".join([*self._behind, *lines])
        try:
            self._file.truncate(self._end)  # what an earlier try may have left
            written = 0
            while written < len(data):
                written += self._file.write(data[written:]) or 0
            os.fsync(self._file.fileno())
        except OSError as error:
            raise StateWriteError(f"cannot write {self._path}: {error.strerror or error}") from error
        self._end += len(data)
        self._behind = []


@dataclass
class Balance:
    """Submissions by what became of them, and what does not add up, in words."""

    accepted: int = 0
    counted: int = 0  # in versions
    refused: int = 0  # in versions, without weight
    pooled: int = 0
    dropped: int = 0
    problems: list[str] = field(default_factory=list)


def check(folder: Path, adapters: Path | None = None) -> Balance:
    """Compare the ledger in `folder`, a federation server's `out`, with its pool and its versions, which are in `adapters`, by
    default those inside `folder`.

    Each accepted submission must be exactly once in a version or in the pool, or be dropped with a reason, and nothing else may
    be in either; what the ledger tells of a version must be what that holds, or held when it was removed. Nothing is changed.
    What a server that still works does in the meantime may look like a problem. Raises `StateError` or `AdapterError` for files
    that cannot be read.
    """
    adapters = folder / "adapters" if adapters is None else adapters
    lines = [line for line, _ in _lines(folder / FILE)]
    try:
        return _balance(lines, folder / "pool", adapters)
    except (KeyError, TypeError) as error:
        raise _damaged(folder / FILE, repr(error)) from error


def _balance(lines: list[dict[str, Any]], pool: Path, adapters: Path) -> Balance:
    begun = next((line["version"] for line in lines if line["event"] == "begin"), None)
    held = {line["version"]: _as_told(line) for line in lines if line["event"] == "removed"}
    held |= {number: load(adapters, number) or Contents("") for number in version_numbers(adapters)}
    held = {number: held[number] for number in sorted(held) if begun is None or number > begun}
    accepted = [(line["device"], line["submission"]) for line in lines if line["event"] == "accepted"]
    dropped = Counter((line["device"], line["submission"]) for line in lines if line["event"] == "dropped")
    entries = [entry for contents in held.values() for entry in contents.submissions]
    settled = [(entry.device, entry.submission) for entry in entries]
    counted = set(settled)
    pooled = [key for key in _pooled(pool) if key not in counted]  # files of those are yet to be deleted
    places = Counter([*settled, *pooled])
    return Balance(
        accepted=len(accepted),
        counted=sum(not entry.refused for entry in entries),
        refused=sum(bool(entry.refused) for entry in entries),
        pooled=len(pooled),
        dropped=len(dropped.keys() & set(accepted)),
        problems=[*_misplaced(Counter(accepted), places, dropped), *_mistold(lines, held)],
    )


def _misplaced(accepted: Counter[Key], places: Counter[Key], dropped: Counter[Key]) -> Iterator[str]:
    """What was dropped may have been accepted anew, and what was only half there may have come again."""
    for key in sorted(accepted.keys() | places.keys()):
        name = f"submission {key[1]} of device '{key[0]}'"
        if not 1 <= accepted[key] <= 1 + dropped[key]:
            yield f"{name} is in the ledger {accepted[key]} times, and in versions and pool {places[key]} times"
        elif places[key] > 1:
            yield f"{name} is in versions and pool {places[key]} times"
        elif not places[key] and not dropped[key]:
            yield f"{name} was accepted and is nowhere"


def _mistold(lines: Iterable[dict[str, Any]], held: Mapping[int, Contents]) -> Iterator[str]:
    """A version's line comes after the version, so that of the newest may be missing."""
    told = {line["version"]: [tuple(key) for key in line["submissions"]] for line in lines if line["event"] == "version"}
    newest = max(held, default=None)
    for number in sorted(told.keys() | held.keys()):
        there = [(entry.device, entry.submission) for entry in held[number].submissions] if number in held else None
        if told.get(number) != there and not (number == newest and number not in told):
            yield f"version {number} holds {there}, and the ledger says {told.get(number)}"


def _pooled(folder: Path) -> list[Key]:
    """Whole submissions in the pool's folder."""
    halves: dict[Key, set[str]] = {}
    for path in folder.glob(f"[0-9]*{half_files.SUFFIX}"):
        about = half_files.HalfFile(path).about()
        halves.setdefault((about["device"], about["submission"]), set()).add(about["half"])
    return [key for key, roles in halves.items() if len(roles) == 2]


def _lines(path: Path) -> list[tuple[dict[str, Any], int]]:
    """Each line, and where in the file it ends. What follows the last line break was never acknowledged, and is left out."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    found, end = [], 0
    for number, text in enumerate(data.splitlines(keepends=True), 1):
        if not text.endswith(b"\n"):
            break
        end += len(text)
        try:
            line = json.loads(text)
        except ValueError as error:
            raise _damaged(path, f"line {number}: {error}") from error
        if not isinstance(line, dict):
            raise _damaged(path, f"line {number} is no object")
        found.append((line, end))
    return found


def _held(contents: Contents | None) -> dict[str, Any]:
    """What a line says of a version."""
    entries = () if contents is None else contents.submissions
    return {
        "submissions": [[entry.device, entry.submission] for entry in entries],
        "refused": {entry.device: entry.refused for entry in entries if entry.refused},
    }


def _as_told(line: dict[str, Any]) -> Contents:
    """What a line says of a version, as that would have said it; of how much it was the ledger knows nothing."""
    refused = line["refused"]
    return Contents("", tuple(Entry(device, name, 0, 0, 0, 0.0, refused.get(device, "")) for device, name in line["submissions"]))


def _line(event: str, **fields: Any) -> bytes:
    return (json.dumps({"event": event, "time": round(time.time(), 3), **fields}) + "\n").encode()


def _damaged(path: Path, why: str) -> StateError:
    return StateError(
        f"{path} is damaged ({why}): restore it from a backup, or move it away, and the server begins another with what its"
        " versions and its pool hold"
    )
