"""The files of a half with the checksums of their blocks: what is there, what is missing, what was damaged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sfl.errors import ModelError, WireError

BLOCK_BYTES = 2**20  # lost at most when a fetch is broken off; its checksum is 32 bytes

# What is accepted from an edge server. Names are plain and of kinds that are never run as a program.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}\.(json|safetensors|txt|model|jinja)")
_MAX_FILES, _MAX_BYTES = 64, 2**40
_BLOCK_RANGE = (2**12, 2**26)
_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class StoredFile:
    """A file of `size` bytes and the SHA-256 of each of its blocks, of which the last may be shorter."""

    name: str
    size: int
    blocks: tuple[bytes, ...]


class Gap(NamedTuple):
    """`length` bytes of a file from `offset` on, whole blocks, that are not there as they should be."""

    file: StoredFile
    offset: int
    length: int


@dataclass(frozen=True)
class Manifest:
    """All files of a half. Block i of a file begins at byte `i * block_bytes`."""

    block_bytes: int
    files: tuple[StoredFile, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @classmethod
    def of(cls, folder: Path) -> Manifest:
        """That of the files in `folder`. Raises `ModelError` for a file that no half may have."""
        files = [_stored(path) for path in sorted(folder.iterdir()) if path.is_file()]
        try:
            return check(cls(BLOCK_BYTES, tuple(files)))
        except WireError as error:
            raise ModelError(f"the half in {folder} cannot be provided: {error}") from error

    def gaps(self, folder: Path) -> list[Gap]:
        """What `folder` lacks or holds damaged, neighbouring blocks as one gap; reads every byte. None for a whole half."""
        return [gap for file in self.files for gap in self._gaps(file, folder / file.name)]

    def _gaps(self, file: StoredFile, path: Path) -> Iterator[Gap]:
        there = path.stat().st_size if path.is_file() and not path.is_symlink() else -1
        found = list(_digests(path, self.block_bytes)) if there >= 0 else []
        wrong = [index for index, digest in enumerate(file.blocks) if index >= len(found) or found[index] != digest]
        if not wrong and there != file.size:  # empty and missing, or something was added at its end
            yield Gap(file, file.size, 0)
        while wrong:
            count = next((n for n in range(1, len(wrong)) if wrong[n] != wrong[0] + n), len(wrong))
            offset = wrong[0] * self.block_bytes
            yield Gap(file, offset, min(file.size, (wrong[0] + count) * self.block_bytes) - offset)
            wrong = wrong[count:]

    def to_json(self) -> str:
        files = [{"name": file.name, "bytes": file.size, "blocks": [each.hex() for each in file.blocks]} for file in self.files]
        return json.dumps({"block_bytes": self.block_bytes, "files": files})

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Raises `WireError` for a text that is no manifest, cut off perhaps."""
        try:
            tree = json.loads(text)
            files = [
                StoredFile(str(file["name"]), int(file["bytes"]), tuple(bytes.fromhex(each) for each in file["blocks"]))
                for file in tree["files"]
            ]
            return check(cls(int(tree["block_bytes"]), tuple(files)))
        except (ValueError, KeyError, TypeError) as error:
            raise WireError(f"this is no list of files with checksums: {error}") from error


def check(manifest: Manifest) -> Manifest:
    """The same again. Raises `WireError` for names that are not plain, sizes beyond any model's or checksums that cannot be."""
    names = {file.name.lower() for file in manifest.files}
    if not 1 <= len(manifest.files) <= _MAX_FILES or len(names) != len(manifest.files):
        raise WireError(f"a half has 1 to {_MAX_FILES} files of different names, not {len(manifest.files)} of {len(names)} names")
    if not _BLOCK_RANGE[0] <= manifest.block_bytes <= _BLOCK_RANGE[1]:
        raise WireError(f"blocks of {manifest.block_bytes} bytes are not accepted: {_BLOCK_RANGE[0]} to {_BLOCK_RANGE[1]} are")
    for file in manifest.files:
        if not _NAME.fullmatch(file.name):
            raise WireError(f"{file.name[:100]!a} is no name of a model's file")
        if not 0 <= file.size <= _MAX_BYTES:
            raise WireError(f"{file.name} is announced with {file.size} bytes")
        if len(file.blocks) != -(-file.size // manifest.block_bytes) or any(len(each) != _DIGEST_BYTES for each in file.blocks):
            raise WireError(f"{file.name} has {file.size} bytes and {len(file.blocks)} checksums, which do not fit together")
    return manifest


def _stored(path: Path) -> StoredFile:
    return StoredFile(path.name, path.stat().st_size, tuple(_digests(path, BLOCK_BYTES)))


def _digests(path: Path, block_bytes: int) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as stream:
        block = memoryview(bytearray(block_bytes))
        while filled := _fill(stream.readinto, block):
            yield hashlib.sha256(block[:filled]).digest()


def _fill(read_into: Callable[[memoryview], int | None], block: memoryview) -> int:
    """Read until `block` is full or the file ends; how many bytes there are."""
    filled = 0
    while filled < len(block) and (count := read_into(block[filled:])):
        filled += count
    return filled
