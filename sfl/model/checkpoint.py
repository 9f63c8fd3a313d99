"""The tensors of a safetensors checkpoint, found by name: each is mapped into memory or read in rows, never as a whole file."""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.hub import cached_file, cached_files

from sfl.errors import DamagedModelError, ModelError, ModelNotFoundError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {  # what safetensors calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # mmap.MAP_NORESERVE, which Python has from 3.13 on
_CHUNK = 1 << 20  # bytes read at a time where a tensor is converted


class WeightsFile:
    """A safetensors file: 8 bytes of header length, the header as JSON, then the tensors' bytes.

    Raises `ModelError` when it is none, or is truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            text = stream.read(length) if 2 <= length <= size - 8 else b""
        try:
            entries: dict[str, Any] = json.loads(text)
            entries.pop("__metadata__", None)
            self.tensors = {
                name: StoredTensor(self, name, entry["dtype"], tuple(entry["shape"]), 8 + length + start, 8 + length + stop)
                for name, entry in entries.items()
                for start, stop in [entry["data_offsets"]]
            }
            for tensor in self.tensors.values():
                if not 8 + length <= tensor.start <= tensor.stop:
                    raise ValueError(f"tensor '{tensor.name}' begins at byte {tensor.start} and ends at {tensor.stop}")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedModelError(f"'{path}' is no safetensors file, or is truncated ({error}): fetch it again") from error
        if any(tensor.stop > size for tensor in self.tensors.values()):
            raise DamagedModelError(f"'{path}' is truncated at {size} bytes: fetch it again")

    @cached_property
    def descriptor(self) -> int:
        """The file opened for reads at random places: the system does not read ahead, so only what is asked for is cached."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        return self._file.fileno()

    @cached_property
    def _file(self) -> FileIO:
        return self.path.open("rb", buffering=0)

    @cached_property
    def mapping(self) -> mmap.mmap:
        """The whole file in private memory: pages become resident when touched; the file itself is never written.

        No memory is reserved, as the file may be larger than what the machine has.
        """
        with self.path.open("rb") as stream:
            return mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: bytes `start` to `stop` of its file, in row-major order."""

    file: WeightsFile
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def dtype(self) -> torch.dtype:
        """Raises `ModelError` for a number format that this torch or `sfl` does not know."""
        if self.dtype_name not in DTYPES:
            raise ModelError(f"tensor '{self.name}' of '{self.file.path}' has the unknown number format {self.dtype_name}")
        return DTYPES[self.dtype_name]

    def mapped(self) -> Tensor:
        """The tensor over the mapped file: no byte of it is read yet."""
        self._require_size()
        if self.start == self.stop or self.start % self.dtype.itemsize:
            return self.read(self.dtype)
        count = (self.stop - self.start) // self.dtype.itemsize
        return torch.frombuffer(self.file.mapping, dtype=self.dtype, count=count, offset=self.start).reshape(self.shape)

    def read(self, dtype: torch.dtype) -> Tensor:
        """A copy in `dtype`, converted about a MB at a time, so that it exists only once."""
        result = torch.empty(self.shape, dtype=dtype)
        if not self.shape:
            return result.copy_(self.rows(0, 1).reshape(()))
        for first, last in self.slabs(_CHUNK):
            result[first:last] = self.rows(first, last)
        return result

    def slabs(self, size: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about `size` bytes each, a multiple of `multiple` rows, that make up the whole."""
        count = self.shape[0]
        step = max(1, size // max(1, self._row_bytes()) // multiple) * multiple
        return ((first, min(first + step, count)) for first in range(0, count, step))

    def rows(self, first: int, last: int) -> Tensor:
        """Rows `first` to `last` - 1 in the stored dtype, read into memory of their own; a scalar is one row."""
        self._require_size()
        result = torch.empty((last - first, *self.shape[1:]), dtype=self.dtype)
        self.read_rows(first, result)
        return result

    def read_rows(self, first: int, into: Tensor) -> None:
        """Fill `into`, contiguous and of the stored dtype, with the rows from `first` on."""
        if not into.numel():
            return
        buffer = into.view(torch.uint8).reshape(-1).numpy().data
        position = self.start + first * self._row_bytes()
        while buffer:
            count = os.preadv(self.file.descriptor, [buffer], position)
            if not count:
                raise DamagedModelError(f"'{self.file.path}' ends inside tensor '{self.name}': fetch it again")
            buffer, position = buffer[count:], position + count

    def _row_bytes(self) -> int:
        return (self.stop - self.start) // max(1, self.shape[0]) if self.shape else self.stop - self.start

    def _require_size(self) -> None:
        count = 1
        for size in self.shape:
            count *= size
        if count * self.dtype.itemsize != self.stop - self.start:
            raise DamagedModelError(
                f"tensor '{self.name}' of '{self.file.path}' is not as long as its shape asks for: fetch it again"
            )


class Checkpoint:
    """The weights of a model directory or hub id; a shard is opened, or fetched, when a tensor in it is asked for.

    Raises `ModelError` when there are no safetensors, a shard is missing, or a file is damaged.
    """

    def __init__(self, name_or_dir: str | Path) -> None:
        self.name_or_dir = name_or_dir
        self._files: dict[str, WeightsFile] = {}
        require_safetensors(name_or_dir)
        self._shard_of = self._shards()

    def get(self, name: str) -> StoredTensor | None:
        """The tensor of this very name, None where there is none."""
        shard = self._shard_of.get(name)
        return None if shard is None else self._open(shard).tensors.get(name)

    def all_tensors(self) -> dict[str, StoredTensor]:
        """Every tensor of the checkpoint by its name."""
        shards = sorted(set(self._shard_of.values()))
        return {name: tensor for shard in shards for name, tensor in self._open(shard).tensors.items()}

    def _shards(self) -> dict[str, str]:
        """The file of each tensor, in those that transformers would load: the whole one, else those that the index names."""
        files = find_files(self.name_or_dir, (WEIGHTS, INDEX))
        if WEIGHTS in files:
            return dict.fromkeys(self._open(WEIGHTS).tensors, WEIGHTS)
        index = files.get(INDEX)
        if index is None:
            raise ModelNotFoundError(f"'{self.name_or_dir}' has neither {WEIGHTS} nor an index of its parts")
        try:
            parts = {str(name): str(shard) for name, shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedModelError(f"'{index}' is no safetensors index ({error}): fetch it again") from error
        for shard in set(parts.values()):
            if not shard or set(shard) & {"/", "\\", "\0"} or shard in (".", ".."):
                raise DamagedModelError(f"'{index}' names the part {shard[:100]!a}, which is no plain file name: fetch it again")
        return parts

    def _open(self, shard: str) -> WeightsFile:
        if shard not in self._files:
            path = find_file(self.name_or_dir, shard)
            if path is None:
                raise DamagedModelError(
                    f"'{self.name_or_dir}' lacks the weights file {shard} that its index names: fetch it again"
                )
            self._files[shard] = WeightsFile(path)
        return self._files[shard]


def is_directory(name_or_dir: str | Path) -> bool:
    """Whether this names a model directory; a hub id such as `facebook/opt-125m` otherwise."""
    return Path(name_or_dir).expanduser().is_dir()


def require_safetensors(name_or_dir: str | Path) -> None:
    """Raise `ModelError` when a model directory has no weights in safetensors; a hub id passes."""
    if is_directory(name_or_dir) and not list(Path(name_or_dir).expanduser().glob("*.safetensors")):
        raise ModelError(
            f"'{name_or_dir}' has no weights in safetensors; pickled weights (.bin, .pt) are never loaded:"
            " convert them once with save_pretrained(..., safe_serialization=True) where you trust their source"
        )


def find_file(name_or_dir: str | Path, name: str) -> Path | None:
    """A file of a model directory, or of a hub id's local copy, which is fetched where it is missing; None without it."""
    if is_directory(name_or_dir):
        path = Path(name_or_dir).expanduser() / name
        return path if path.is_file() else None
    found = cached_file(
        str(name_or_dir), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def find_files(name_or_dir: str | Path, names: Sequence[str]) -> dict[str, Path]:
    """Those of several files that there are, by name. A hub id is asked for all at once: where the hub cannot be reached, the
    local copy counts as it is, and no time is spent on asking again for a file that the model never had."""
    if is_directory(name_or_dir):
        return {name: path for name in names if (path := find_file(name_or_dir, name)) is not None}
    found = cached_files(
        str(name_or_dir), list(names), _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return {Path(path).name: Path(path) for path in found or ()}
