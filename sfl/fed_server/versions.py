"""The versions of the global adapter: on disk until they are removed, the newest in memory."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from sfl.adapters import checksums, peft_format
from sfl.adapters.layout import AdapterLayout
from sfl.adapters.state import AdapterState
from sfl.errors import AdapterError


class Version(NamedTuple):
    """A published version. Its arrays must not be changed."""

    number: int
    state: AdapterState
    layout: AdapterLayout


class VersionStore:
    """Keeps version N in `folder`/vN, in PEFT's format; resumes from the newest one when there already is any.
    What a killed server left unfinished there is deleted.

    Raises `AdapterError` when that one is damaged. Every method that reads raises `OSError` for files that cannot be read now.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._newest: Version | None = None
        peft_format.sweep(folder)
        numbers = version_numbers(folder)
        if numbers:
            newest = self._path(max(numbers))
            checksums.check(newest)
            self._newest = Version(max(numbers), *peft_format.read(newest))

    def newest(self) -> Version | None:
        """The newest version, None before the first."""
        return self._newest

    def publish(self, number: int, state: AdapterState, layout: AdapterLayout, extras: Mapping[str, bytes] | None = None) -> None:
        """Write a version, with `extras` as more files of its folder, and make it the newest.

        Raises `AdapterError`, and keeps the newest as it was, when it is not the next one or does not fit `layout`, and
        `AdapterWriteError` when it cannot be written.
        """
        following = 0 if self._newest is None else self._newest.number + 1
        if number != following:
            raise AdapterError(f"version {number} cannot be published: the next one is {following}")
        peft_format.write(self._path(number), state, layout, extras)
        self._newest = Version(number, state, layout)

    def load(self, number: int) -> AdapterState:
        """A version's tensors. Raises `AdapterError` when there is no such version (any more) or its files are damaged."""
        if self._newest is None or not 0 <= number <= self._newest.number:
            newest = "none is published yet" if self._newest is None else f"the newest is {self._newest.number}"
            raise AdapterError(f"there is no version {number}: {newest}")
        if number == self._newest.number:
            return self._newest.state
        if not self._path(number).is_dir():
            raise AdapterError(
                f"version {number} has been removed, and {self._newest.number} is the newest: `keep_versions` in the federation"
                " server's settings says how many are kept"
            )
        return peft_format.read(self._path(number))[0]

    def superseded(self, keep: int, needed: Collection[int]) -> list[int]:
        """The versions on disk, sorted, that are not among the `keep` newest, nor `needed`, nor version 0; none for 0."""
        if self._newest is None or not keep:
            return []
        older = range(1, self._newest.number - keep + 1)
        return sorted(number for number in version_numbers(self.folder) if number in older and number not in needed)

    def remove(self, number: int) -> None:
        """Delete a version, unless it is the newest. Raises `AdapterWriteError` when that cannot be done."""
        if self._newest is not None and number < self._newest.number:
            peft_format.remove(self._path(number))

    def extra(self, number: int, name: str) -> bytes | None:
        """What `publish` wrote to the file `name` beside a version; None when there is no such file."""
        path = self._path(number) / name
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    def add_extra(self, number: int, name: str, content: bytes) -> None:
        """Write one more file beside a version. Raises `AdapterWriteError` when it cannot be written."""
        peft_format.add_file(self._path(number), name, content)

    def _path(self, number: int) -> Path:
        return self.folder / f"v{number}"


def version_numbers(folder: Path) -> list[int]:
    """The versions that `folder` holds, in no order; none where there is no such folder."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(r"v(\d+)", path.name) for path in folder.iterdir())
    return [int(match[1]) for match in matches if match]
