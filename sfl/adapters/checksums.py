"""Checksums of a folder's files, as `sha256sum -c` reads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sfl.errors import AdapterError

FILE = "SHA256SUMS"


def write(folder: Path) -> None:
    """Write the checksums of all files that are in `folder` now. Raises `OSError`."""
    lines = [f"{_sum(path)}  {path.name}\n" for path in sorted(folder.iterdir())]
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def check(folder: Path) -> None:
    """Raise `AdapterError` for a file of `folder` that is not as it was written. A folder without checksums passes.

    Raises `OSError` for one that cannot be read now.
    """
    sums = folder / FILE
    if not sums.exists():
        return
    try:
        for line in sums.read_text(encoding="utf-8").splitlines():
            expected, _, name = line.partition("  ")
            if _sum(folder / name) != expected:
                raise AdapterError(
                    f"{folder / name} is damaged, or was changed: its checksum is not the one in {FILE}; restore {folder} from a"
                    f" backup, or delete its {FILE} to take what is there"
                )
    except (FileNotFoundError, ValueError) as error:
        raise AdapterError(f"{folder} is damaged: {error}; restore it from a backup, or delete its {FILE}") from error


def _sum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
