"""A disk whose machine loses its power, or a process that is killed, at a chosen file operation; or a disk that is full."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from sfl.adapters import peft_format
from sfl.fed_server import half_files

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_EVENTS = ("open", "save", "fsync", "os.rename", "os.remove", "os.mkdir")


class Killed(BaseException):
    """The process is no more. No handler of `Exception` sees it."""


class Disk:
    """Counts the operations that change what is below `root`: opening to write, renaming, deleting, making folders, syncing.

    `kills` are numbers of operations, each counted from the one before, that are not carried out any more: `Killed` is raised in
    their place. With `power`, all that was not synced is lost then: files lose half of what was written to them since, and what
    was done to folders is undone. From the operation `full_at` on the disk is full, until `full` is set to False.
    """

    active: Disk | None = None

    def __init__(self, root: Path, kills: Iterable[int] = (), power: bool = False, full_at: int = 0) -> None:
        self.operations = 0
        self.killed = 0
        self.full = False
        self._full_at = full_at
        self._root = root
        self._power = power
        self._kills = iter(kills)
        self._kill_at = next(self._kills, None)
        self._synced: dict[Path, int] = {}  # bytes that are safe, of files that were written since they were synced
        self._undo: list[tuple[Path, Callable[[], object]]] = []  # a folder, and what would take back a change to it

    def operation(self, name: str, path: Path) -> None:
        self.operations += 1
        if self.operations == self._kill_at:
            self._kill_at = next((self.operations + after for after in self._kills), None)
            self.killed += 1
            if self._power:
                self._lose()
            self._synced, self._undo = {}, []
            raise Killed(f"operation {self.operations}: {name} {path}")
        self.full = self.full or self.operations == self._full_at
        if self.full and name not in ("rename", "remove"):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    def _lose(self) -> None:
        for path, safe in self._synced.items():
            if path.is_file():
                os.truncate(path, safe + (path.stat().st_size - safe) // 2)
        for _, undo in reversed(self._undo):
            undo()

    def hears(self, event: str, path: Path, *more: Any) -> None:
        """What is about to be done with a file."""
        if not path.is_relative_to(self._root):
            return
        if event == "open" and not (more[1] or 0) & _WRITES:
            return
        if event in ("open", "save"):
            self._writes(event, path, event == "save" or bool(more[1] & os.O_TRUNC))
        elif event == "fsync":
            self.operation("sync", path)
            self._synced.pop(path, None)
            self._undo = [(folder, undo) for folder, undo in self._undo if folder != path]
        elif event == "os.rename":
            self._renames(path, Path(more[0]))
        elif event == "os.remove" and path.exists():
            self.operation("remove", path)
            content = path.read_bytes()
            self._synced.pop(path, None)
            self._undo.append((path.parent, lambda: path.write_bytes(content)))
        elif event == "os.mkdir" and not path.exists():
            self.operation("mkdir", path)
            self._undo.append((path.parent, lambda: shutil.rmtree(path, ignore_errors=True)))

    def _writes(self, event: str, path: Path, anew: bool) -> None:
        if path.is_dir():
            return
        self.operation(event, path)
        if not path.exists():
            self._undo.append((path.parent, lambda: path.unlink(missing_ok=True)))
        self._synced.setdefault(path, path.stat().st_size if path.exists() and not anew else 0)

    def _renames(self, source: Path, target: Path) -> None:
        self.operation("rename", source)
        content = target.read_bytes() if target.is_file() else None

        def undo() -> None:
            target.rename(source)
            if content is not None:
                target.write_bytes(content)

        self._undo.append((target.parent, undo))
        for path in [path for path in self._synced if path.is_relative_to(source)]:
            self._synced[target / path.relative_to(source)] = self._synced.pop(path)


def _heard(event: str, arguments: tuple[Any, ...]) -> None:
    """Python tells this of what it is about to do."""
    disk = Disk.active
    if disk is None or event not in _EVENTS or not isinstance(arguments[0], (str, os.PathLike)):
        return
    Disk.active = None  # looking at files is not an operation, nor is losing them
    try:
        disk.hears(event, Path(arguments[0]), *arguments[1:])
    finally:
        Disk.active = disk


_hooked = False


@contextmanager
def faulty(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """Have `disk` see what this process does with files. Nothing is synced to the real one, which takes time."""
    global _hooked
    if not _hooked:
        sys.addaudithook(_heard)  # which cannot be taken back
        _hooked = True

    def saving(save: Callable[..., None]) -> Callable[..., None]:
        def save_file(tensors: Any, path: Path, metadata: Any = None) -> None:
            _heard("save", (path,))
            save(tensors, path, metadata=metadata)

        return save_file

    def fsync(descriptor: int) -> None:
        _heard("fsync", (Path(f"/proc/self/fd/{descriptor}").readlink(),))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        for module in (half_files, peft_format):
            patch.setattr(module, "save_file", saving(module.save_file))
        Disk.active = disk
        try:
            yield disk
        finally:
            Disk.active = None
