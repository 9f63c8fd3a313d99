"""The device's side of checkpoints: a numbered file each, of which it keeps those that the edge may be at."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sfl.cache.lock import FileLock, try_lock
from sfl.disk import UNFINISHED
from sfl.errors import StateDiffersError, StateError, StateInUseError, StateWriteError
from sfl.state_file import Document, Tensors, read_state, write_state
from sfl.telemetry import log

State = tuple[Document, Tensors]

FORMAT = 1  # of what a device's file holds
FOLDER = "state"  # inside a device's `out`
_DONE = "done"  # name of the empty file that a run leaves which has come to its end
_AGAIN_S = 5.0  # between two tries to write what must be written
_NAME = re.compile(r"checkpoint-(\d+)\.state")


class Checkpoints(Protocol):
    """Where a run keeps its states. Their numbers never go back while the edge has not."""

    def write(self, state: Callable[[], State], must: bool) -> int:
        """Keep a state under the next number, which is returned.

        Where it cannot be written, 0 is returned, or if it `must` be, `StateWriteError` raised.
        """

    def amend(self, state: Callable[[], State]) -> None:
        """Have the newest state say more of what this side alone knows, if that can be written; to the edge it is the same."""

    def read(self, number: int) -> State:
        """The state of this number. Raises `StateError`."""

    def newest(self) -> State:
        """The state that was written last. Raises `StateError`."""

    def go_back(self, number: int) -> None:
        """Have this be the newest; what was written after it never was."""


class CountedCheckpoints:
    """Only counts: for runs in one process, which nothing survives, so that their messages are those of daemons."""

    def __init__(self) -> None:
        self._newest = 0

    def write(self, state: Callable[[], State], must: bool) -> int:
        self._newest += 1
        return self._newest

    def amend(self, state: Callable[[], State]) -> None:
        """There is nothing to say it in."""

    def read(self, number: int) -> State:
        raise StateError(f"checkpoint {number} was only counted")

    def newest(self) -> State:
        return self.read(self._newest)

    def go_back(self, number: int) -> None:
        self._newest = number


class CheckpointFiles:
    """Files `checkpoint-NUMBER.state` in `folder`, the last two, which one process at a time may have.

    When a number is written, the edge has answered the one before: so it is there, or will be at the new one.
    What must be written is tried for `give_up_s` seconds.
    Raises `StateInUseError`, `StateError` when there are files and none can be read, and `StateWriteError` for a folder that
    cannot be used.
    """

    def __init__(self, folder: Path, give_up_s: float = 0.0) -> None:
        self.document: Document = {}  # of the newest one that an earlier process has left
        self._folder = folder
        self._give_up_s = give_up_s
        self._sessions: dict[int, str] = {}  # by number, of those that can be read
        self._stale: list[int] = []  # of a run that is not gone on with
        self._lock = _take(folder)
        try:
            self._look()
        except BaseException:
            self._lock.release()
            raise
        self._newest = max(self._sessions, default=0)
        self.done = not self._sessions and (folder / _DONE).exists()  # an earlier run has come to its end
        self._identity: Document = self.document.get("identity", {})

    def require(self, identity: Mapping[str, Any]) -> None:
        """Take note of what training depends on, JSON-serialisable, before anything is written.

        Raises `StateDiffersError`, naming the first difference, where what is here was kept under another one.
        """
        now: Document = json.loads(json.dumps(identity))  # as it will be read
        for name, value in now.items() if self.document else ():
            if self._identity.get(name) != value:
                raise StateDiffersError(
                    f"what {self._folder} keeps was trained with {name} {_show(self._identity.get(name))}, and now it is"
                    f" {_show(value)}: put that back, choose another `out`, or delete that folder to start anew"
                )
        self._identity = now

    @property
    def session(self) -> str | None:
        """The session that the newest checkpoint is of; None if there is none."""
        return self._sessions.get(self._newest)

    @property
    def held(self) -> tuple[int, ...]:
        """The numbers of this session that are here."""
        return tuple(sorted(number for number, session in self._sessions.items() if session == self.session))

    def write(self, state: Callable[[], State], must: bool) -> int:
        document, tensors = state()
        number, started = self._newest + 1, time.monotonic()
        for old in [each for each in self._sessions if each < self._newest]:
            self._delete(old)
        while True:
            try:
                self._write(number, document, tensors)
                break
            except StateWriteError as error:
                if not must:
                    log.warning("%s; training goes on without this checkpoint", error)
                    return 0
                if time.monotonic() - started + _AGAIN_S > self._give_up_s:
                    raise
                log.warning("%s; trying again in %g s", error, _AGAIN_S)
            time.sleep(_AGAIN_S)
        self._sessions[number] = document["session"]
        self._newest = number
        while self._stale:
            self._delete(self._stale.pop())
        if self.done:
            self._unlink(self._folder / _DONE)
            self.done = False
        return number

    def amend(self, state: Callable[[], State]) -> None:
        document, tensors = state()
        try:
            self._write(self._newest, document, tensors)
        except StateWriteError as error:
            log.warning("%s", error)

    def read(self, number: int) -> State:
        return read_state(self._path(number))

    def newest(self) -> State:
        return self.read(self._newest)

    def go_back(self, number: int) -> None:
        for later in [each for each in self._sessions if each > number]:
            self._delete(later)
        self._newest = number

    def begin_anew(self) -> None:
        """Go on with nothing that is here. It is deleted once there is a first state: until then it says that a run had begun."""
        self._stale, self._sessions, self.document, self._identity = list(self._sessions), {}, {}, {}

    def clear(self) -> None:
        """Delete all: the run has come to its end."""
        for number in sorted(self._sessions):  # the newest last: a run that went on from an earlier one would train again
            self._delete(number)
        self._newest, self.document = 0, {}
        try:
            (self._folder / _DONE).touch()
        except OSError as error:
            log.warning("%s cannot be written, so that the next run will not say that this one was done: %s", self._folder, error)

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.release()

    def _write(self, number: int, document: Document, tensors: Tensors) -> None:
        write_state(self._path(number), {**document, "format": FORMAT, "identity": self._identity}, tensors)

    def _look(self) -> None:
        """Find out what is there."""
        damaged, newest = None, 0
        for path in sorted(self._folder.iterdir()):
            if path.name.endswith(UNFINISHED):
                path.unlink(missing_ok=True)
            if (name := _NAME.fullmatch(path.name)) is None:
                continue
            try:
                document, _ = read_state(path)
            except StateError as error:
                log.error("%s", error)
                damaged = error
                continue
            if document.get("format") != FORMAT:
                raise StateDiffersError(f"{path} is of another version of sfl: use that, or delete the folder to start anew")
            number = int(name[1])
            self._sessions[number] = document["session"]
            if number > newest:
                self.document, newest = document, number
        if damaged is not None and not self._sessions:
            raise damaged

    def _path(self, number: int) -> Path:
        return self._folder / f"checkpoint-{number}.state"

    def _delete(self, number: int) -> None:
        self._sessions.pop(number, None)
        self._unlink(self._path(number))

    def _unlink(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be deleted, though nothing needs it any more: %s", path, error)


def kept_cut(folder: Path) -> int | None:
    """The cut of the run whose checkpoints are in `folder`; None if there are none that can be read."""
    for path in sorted(folder.glob("checkpoint-*.state")):
        try:
            cut = read_state(path)[0]["identity"]["cut"]
        except (StateError, OSError, KeyError, TypeError):
            continue  # whoever opens the folder says what is wrong
        if isinstance(cut, int):
            return cut
    return None


def _take(folder: Path) -> FileLock:
    try:
        lock = try_lock(folder / "lock")
    except OSError as error:
        raise StateWriteError(f"checkpoints cannot be kept in {folder}: {error.strerror or error}") from error
    if lock is None:
        raise StateInUseError(f"another device works with {folder}: stop it, or give each its own `out`")
    return lock


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
