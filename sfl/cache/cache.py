"""A folder of halves: found by key, used only when whole, bounded, the least recently used gone first.

FOLDER/<source>/cut-2-int8/manifest.json   the files with their checksums
FOLDER/<source>/cut-2-int8/model/          the half, a model folder like any other
FOLDER/<source>/cut-2-int8.part/model/     one that is being packed or fetched, or was until a break
FOLDER/locks/                              taken by who writes, uses or provides halves
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfl.cache.key import HalfKey, checked_key
from sfl.cache.lock import FileLock, try_lock, wait_for_lock
from sfl.cache.manifest import Manifest
from sfl.errors import DamagedModelError, DiskShortError, WireError
from sfl.model.packed import read_packed
from sfl.telemetry import log

_PART = ".part"
_PROVIDE_WAIT_S = 10.0


def default_folder(role: str) -> Path:
    """Where the cache of `role` (edge or device) is unless settings say otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "sfl" / role


@dataclass(frozen=True)
class Entry:
    """A half in the cache. `used` is the Unix time of its last use in seconds; it is `complete`, or was broken off."""

    key: HalfKey
    folder: Path
    size: int  # bytes
    used: float
    complete: bool


class HalfCache:
    """The halves below `folder`, together at most `limit_mb` MB (10**6 bytes). Nothing is made there before it is needed."""

    def __init__(self, folder: Path, limit_mb: float) -> None:
        self.folder = folder.expanduser()
        self._limit = int(limit_mb * 1e6)

    def model(self, key: HalfKey) -> Path:
        """The model folder of a complete half."""
        return self._entry(key) / "model"

    def manifest(self, key: HalfKey) -> Manifest | None:
        """The files that the complete half `key` had when it was finished; None if there is none."""
        try:
            return Manifest.from_json((self._entry(key) / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, WireError):
            return None

    def finished(self, key: HalfKey) -> int | None:
        """When the complete half was finished, in ns since 1970, which tells it from one that takes its place; None if there is
        none."""
        try:
            return (self._entry(key) / "manifest.json").stat().st_mtime_ns
        except OSError:
            return None

    def begin(self, key: HalfKey) -> Path:
        """The folder for the files of a half that is not whole yet, with those that are there.

        A half that was complete is so no longer. The caller holds the lock for itself alone.
        """
        entry, part = self._entry(key), self._part(key)
        if entry.exists():
            if part.exists():
                shutil.rmtree(part)
            entry.rename(part)
        (part / "model").mkdir(parents=True, exist_ok=True)
        return part / "model"

    def finish(self, key: HalfKey, manifest: Manifest) -> Path:
        """Make what `begin` gave the complete half, all at once; its model folder. Raises `ModelError` if it is another half."""
        part = self._part(key)
        _require_half(part / "model", key)
        (part / "manifest.json").write_text(manifest.to_json(), encoding="utf-8")
        part.rename(self._entry(key))
        self.touch(key)
        return self.model(key)

    def touch(self, key: HalfKey) -> None:
        """Note that it is being used."""
        os.utime(self._entry(key))

    def make_room(self, key: HalfKey, size: int) -> None:
        """Remove what was not used for longest, and is not in use, until a half `key` of `size` bytes keeps to the limit.

        Raises `SettingsError` when it cannot.
        """
        if size > self._limit:
            raise DiskShortError(
                f"{key} takes {size / 1e6:.0f} MB, and the cache {self.folder} may have {self._limit / 1e6:.0f} MB:"
                " raise `cache_limit_mb`"
            )
        others = [entry for entry in self.entries() if entry.key != key]
        taken = sum(entry.size for entry in others)
        for entry in others:
            if taken + size <= self._limit:
                return
            if self.remove(entry):
                taken -= entry.size
                log.info("removed %s from the cache: it was not used for longest (%.0f MB)", entry.key, entry.size / 1e6)
        if taken + size > self._limit:
            raise DiskShortError(
                f"{key} takes {size / 1e6:.0f} MB, and halves in use take {taken / 1e6:.0f} of the {self._limit / 1e6:.0f} MB"
                f" that the cache {self.folder} may have: raise `cache_limit_mb`"
            )

    def require_disk(self, what: str, size: int) -> None:
        """Raise `SettingsError` unless the disk has room for `size` more bytes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if size > free:
            raise DiskShortError(
                f"{what} needs {size / 1e6:.0f} MB more in {self.folder}, and {free / 1e6:.0f} MB are free: make room"
                " (`sfl cache list` shows what is kept), or name another folder with `cache`"
            )

    def entries(self) -> list[Entry]:
        """All halves, whole or not, the least recently used first."""
        return sorted(self._entries(), key=lambda entry: entry.used)

    def remove(self, entry: Entry) -> bool:
        """Delete a half, unless somebody has done so since it was listed; False if it is in use, and stays."""
        lock = self.try_lock(entry.key)
        if lock is None:
            return False
        with lock:
            if entry.folder.exists():
                shutil.rmtree(entry.folder)
            with contextlib.suppress(OSError):  # other halves of the model
                entry.folder.parent.rmdir()
        return True

    def in_use(self, key: HalfKey) -> bool:
        """Whether some process writes, uses or provides the half at this moment."""
        return not (_free(self._lock(key)) and _free(self._provided(key.source)))

    def provide(self, source: str) -> FileLock:
        """Say, until the lock ends, that halves of `source` are being provided from here.

        They count as `in_use`; where room is needed they are removed all the same, as their edge server can pack them anew.
        """
        return wait_for_lock(self._provided(source), _PROVIDE_WAIT_S, f"source {source[:12]} in the cache", shared=True)

    def try_lock(self, key: HalfKey, shared: bool = False) -> FileLock | None:
        """The right to write the half, or `shared` to use it; None while others are in the way."""
        return try_lock(self._lock(key), shared)

    def _entries(self) -> Iterator[Entry]:
        for folder in self.folder.glob("*/cut-*"):
            name = folder.name.removesuffix(_PART)
            _, cut, precision = (*name.split("-"), "", "")[:3]
            with contextlib.suppress(WireError, OSError):  # no half, or one that is being removed
                key = checked_key(folder.parent.name, int(cut) if cut.isdecimal() else 0, precision)
                if key.name == name:
                    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
                    yield Entry(key, folder, size, folder.stat().st_mtime, folder.name == name)

    def _entry(self, key: HalfKey) -> Path:
        return self.folder / key.source / key.name

    def _part(self, key: HalfKey) -> Path:
        return self.folder / key.source / (key.name + _PART)

    def _lock(self, key: HalfKey) -> Path:
        return self.folder / "locks" / f"{key.source}-{key.name}.lock"

    def _provided(self, source: str) -> Path:
        return self.folder / "locks" / f"{source}.lock"


def _free(lock: Path) -> bool:
    """Whether nobody has it at this moment."""
    found = try_lock(lock)
    if found is not None:
        found.release()
    return found is not None


def _require_half(folder: Path, key: HalfKey) -> None:
    """Raise `ModelError` unless `folder` says that it holds this half, in the pack format of this version."""
    packed = read_packed(folder)
    if packed is None:
        raise DamagedModelError(f"the folder {folder} does not say which half it holds: it has no sfl.json")
    found = HalfKey(packed.source, packed.cut, packed.precision)
    if found != key:
        raise DamagedModelError(f"the folder {folder} holds {found}, not {key}")
