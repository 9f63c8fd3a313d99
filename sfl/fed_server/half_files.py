"""Halves of updates as files: safetensors, what a half says of itself as metadata. Written whole or not at all, read mapped."""

from __future__ import annotations

import json
import mmap
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sfl.adapters.disk import sync
from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterKey, AdapterState, Array
from sfl.errors import AdapterError

SUFFIX = ".safetensors"
_LENGTH_BYTES = 8  # of the header, at the file's beginning; the tensors follow the header
_FLOAT = np.dtype("<f4")


class _Place(NamedTuple):
    """Where a tensor lies in a file."""

    offset: int  # bytes from the first tensor's
    values: int
    shape: tuple[int, ...]


_Places = dict[AdapterKey, _Place]


class HalfFile:
    """Half an update that was written to `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._places: tuple[int, _Places] | None = None  # once tensors were asked for by name, as it is done many times then

    def read(self, keys: Collection[AdapterKey] | None = None) -> AdapterState:
        """Its tensors, or those of them that `keys` names.

        They are mapped, for reading only: what is not looked at is not read, and the file may be deleted while they are in use.
        Raises `AdapterError` when the file is missing or damaged.
        """
        try:
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
        except (OSError, ValueError, KeyError, TypeError, AttributeError, AdapterError) as error:
            raise AdapterError(f"half an update in {self.path} cannot be read: {error!r}") from error

    def delete(self) -> None:
        """Raises `OSError` when it cannot be deleted."""
        self.path.unlink(missing_ok=True)


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
    unfinished = path.with_name(f".{path.name}")
    tensors = {str(key): np.ascontiguousarray(value, dtype=np.float32) for key, value in state.items()}
    try:
        save_file(tensors, unfinished, metadata={name: str(value) for name, value in about.items()})
        if lasting:
            sync(unfinished)
        unfinished.rename(path)
        if lasting:
            sync(path.parent)
    except (OSError, SafetensorError) as error:
        for leftover in (unfinished, path):
            leftover.unlink(missing_ok=True)
        raise AdapterWriteError(f"cannot keep half an update in {path.parent}: {error}") from error
    return HalfFile(path)


def sweep(folder: Path) -> int:
    """Delete the halves in `folder`, finished or not, and say how many there were; make the folder where there is none.

    Raises `AdapterWriteError` when that cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = [path for path in folder.iterdir() if path.name.endswith(SUFFIX)]
        for path in found:
            path.unlink()
        return len(found)
    except OSError as error:
        raise AdapterWriteError(f"updates cannot be kept in {folder}: {error}") from error
