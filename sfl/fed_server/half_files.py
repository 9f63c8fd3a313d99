"""Halves of updates as files: safetensors, what a half says of itself as metadata, with a checksum of both. Written whole or not
at all, read mapped."""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterKey, AdapterState, Array
from sfl.disk import UNFINISHED, make_folder, of_the_moment, replacing
from sfl.errors import AdapterError
from sfl.telemetry import log

SUFFIX = ".safetensors"
_NAME = re.compile(r"(\d+)-(?:device|edge)" + re.escape(SUFFIX))
_SUM = "sha256"  # its key in the metadata
_LENGTH_BYTES = 8  # of the header, at the file's beginning; the tensors follow the header
_BLOCK = 2**20
_FLOAT = np.dtype("<f4")


class _Place(NamedTuple):
    """Where a tensor lies in a file."""

    offset: int  # bytes from the first tensor's
    values: int
    shape: tuple[int, ...]


_Places = dict[AdapterKey, _Place]


class HalfFile:
    """Half an update that was written to `path`; `damaged` once it was found that it cannot be read, now or later."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.damaged = False
        self._places: tuple[int, _Places] | None = None  # once tensors were asked for by name, as it is done many times then

    def read(self, keys: Collection[AdapterKey] | None = None) -> AdapterState:
        """Its tensors, or those of them that `keys` names.

        They are mapped, for reading only: what is not looked at is not read, and the file may be deleted while they are in use.
        Raises `AdapterError` when the file is missing, damaged or not to be read, `OSError` when that is so for the moment, as
        too many files are open, say: that says nothing of what it holds.
        """
        with self._reading():
            with self.path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            found = _places(mapped) if self._places is None else self._places
            if keys is not None:
                self._places = found
            begin, places = found
            return {
                key: np.frombuffer(mapped, _FLOAT, place.values, begin + place.offset).reshape(place.shape)
                for key, place in places.items()
                if keys is None or key in keys
            }

    def about(self) -> dict[str, str]:
        """What it says of itself, once the whole file was found to be as it was written. Raises as `read` does."""
        with self._reading(), self.path.open("rb") as file:
            while file.read(_BLOCK):  # what the disk cannot give is an error here; where it is mapped, a signal that kills
                pass
        tensors = {str(key): value for key, value in self.read().items()}
        with self._reading(), self.path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            about: dict[str, str] = json.loads(file.read(length))["__metadata__"]
            told = about.pop(_SUM)
        if told != _checksum(about, tensors):
            self.damaged = True
            raise AdapterError(f"half an update in {self.path} is damaged: its checksum is not that of what it holds")
        return about

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        """Raises what `read` raises for what is raised inside."""
        try:
            yield
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AdapterError) as error:
            if isinstance(error, OSError) and of_the_moment(error):
                raise
            self.damaged = not isinstance(error, FileNotFoundError)
            raise AdapterError(f"half an update in {self.path} cannot be read: {error!r}") from error

    def delete(self) -> None:
        """Raises `OSError` when it cannot be deleted."""
        self.path.unlink(missing_ok=True)

    def set_aside(self) -> None:
        """Give a damaged file another name, under which nobody reads it but who looks for what was in it. Raises `OSError`."""
        aside = self.path.with_name(f"{self.path.name}.damaged")
        self.path.replace(aside)
        log.error("half an update is kept as %s, and not counted", aside)


def _places(mapped: mmap.mmap) -> tuple[int, _Places]:
    """Where the first tensor begins, and the place of each from there on."""
    begin = _LENGTH_BYTES + int.from_bytes(mapped[:_LENGTH_BYTES], "little")
    header: dict[str, Any] = json.loads(mapped[_LENGTH_BYTES:begin])
    header.pop("__metadata__", None)
    return begin, _shared(tuple((name, *entry["data_offsets"], tuple(entry["shape"])) for name, entry in header.items()))


@lru_cache(maxsize=64)
def _shared(header: tuple[tuple[str, int, int, tuple[int, ...]], ...]) -> _Places:
    """One for all files that are laid out alike, as a thousand updates of one cut and rank are."""
    return {
        AdapterKey.parse(name): _Place(first, (last - first) // _FLOAT.itemsize, shape) for name, first, last, shape in header
    }


def write(path: Path, state: Mapping[AdapterKey, Array], about: Mapping[str, Any], lasting: bool = True) -> HalfFile:
    """Write a half to `path`, whose folder is there; once it has its name it is whole, if `lasting` even when power is lost.

    Raises `AdapterWriteError`, and leaves nothing behind, when it cannot be written, because the disk is full, say.
    """
    tensors = {str(key): np.ascontiguousarray(value, dtype=np.float32) for key, value in state.items()}
    metadata = {name: str(value) for name, value in about.items()}
    if lasting:
        metadata[_SUM] = _checksum(metadata, tensors)
    try:
        with replacing(path, lasting) as unfinished:
            save_file(tensors, unfinished, metadata=metadata)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):  # it may have its name already, and not last
            path.unlink(missing_ok=True)
        raise AdapterWriteError(f"cannot keep half an update in {path.parent}: {error}") from error
    return HalfFile(path)


def _checksum(about: Mapping[str, str], tensors: Mapping[str, Array]) -> str:
    shapes = [(name, tensors[name].shape) for name in sorted(tensors)]
    digest = hashlib.sha256(json.dumps([sorted(about.items()), shapes]).encode())
    for name, _ in shapes:
        digest.update(tensors[name].data)
    return digest.hexdigest()


def found(folder: Path) -> list[tuple[int, HalfFile]]:
    """The halves in `folder` with their numbers, in order; what was left unfinished there is deleted, and the folder made where
    there is none.

    Raises `AdapterWriteError` when that cannot be done.
    """
    try:
        make_folder(folder)
        halves = []
        for path in folder.iterdir():
            if path.name.startswith(".") and _NAME.fullmatch(path.name[1:].removesuffix(UNFINISHED)):
                path.unlink()
            elif match := _NAME.fullmatch(path.name):
                halves.append((int(match[1]), HalfFile(path)))
        return sorted(halves, key=lambda half: (half[0], half[1].path.name))
    except OSError as error:
        raise AdapterWriteError(f"updates cannot be kept in {folder}: {error}") from error
