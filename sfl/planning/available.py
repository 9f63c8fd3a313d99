"""How much memory this process can have: what the machine has to spare, or less where its cgroup allows less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sfl.profiling.board.files import ROOT, number_in, text_of
from sfl.profiling.board.memory import UNLIMITED, cgroups

# Of a cgroup of version 1 and of 2: its limit, what it uses, and what of that is file cache.
_NAMES = {
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"),
    2: ("memory.max", "memory.current", "inactive_file", "active_file"),
}


def available_memory(root: Path = ROOT) -> float | None:
    """MB (10**6 bytes) that this process can have in all; None where the system does not tell.

    The least of MemAvailable and, for the process's cgroup and those around it, the limit less what is in use, with what
    this process itself holds already. File cache that the system would give back counts as free.
    """
    found = [free for free in (_kilobytes(root / "proc/meminfo", "MemAvailable"), *_groups(root)) if free is not None]
    return (max(0, min(found)) + (_kilobytes(root / "proc/self/status", "RssAnon") or 0)) / 1e6 if found else None


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes in the line `NAME: N kB` of a file of /proc."""
    for line in (text_of(path) or "").splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == f"{name}:" and words[1].isdigit():
            return int(words[1]) * 1024
    return None


def _groups(root: Path) -> Iterator[int]:
    """Free bytes in each cgroup of this process that has a limit."""
    for folder, version in cgroups(root):
        names = _NAMES[version]
        limit, used = number_in(folder / names[0]), number_in(folder / names[1])
        if limit is not None and used is not None and limit < UNLIMITED:
            yield limit - used + _cached(folder, names[2:])


def _cached(folder: Path, names: tuple[str, ...]) -> int:
    lines = (line.split() for line in (text_of(folder / "memory.stat") or "").splitlines())
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] in names and words[1].isdigit())
