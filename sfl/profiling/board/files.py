"""Small files of /proc and /sys. One that is missing, may not be read or fails when read gives None."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def text_of(path: Path) -> str | None:
    """The file's text without white space and NUL at its ends; None for an empty one too."""
    try:
        text = path.read_bytes().decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:  # a sensor that is switched off fails here, with EAGAIN or EINVAL
        return None
    return text or None


def number_in(path: Path) -> int | None:
    """The whole number that the file holds."""
    try:
        return int(text_of(path) or "")
    except ValueError:
        return None


def found(root: Path, pattern: str) -> list[Path]:
    """Paths below `root` that match, in order; those that may not be looked into are left out."""
    try:
        return sorted(root.glob(pattern))
    except OSError:
        return []
