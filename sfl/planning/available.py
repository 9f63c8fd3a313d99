"""How much memory this process can have: what the machine has to spare, or less where its cgroup allows less."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sfl.profiling.board.files import ROOT, number_in, text_of

_UNLIMITED = 2**60  # version 1 has no word for it and gives a number near 2**63


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
    for line in (text_of(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            mount, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file", "active_file")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file")
        else:
            continue
        own = mount / path.lstrip("/")
        # In a container the path may be the host's, and the container's own group is mounted at the top.
        for folder in {own, *(parent for parent in own.parents if parent.is_relative_to(mount)), mount}:
            limit, used = number_in(folder / names[0]), number_in(folder / names[1])
            if limit is not None and used is not None and limit < _UNLIMITED:
                yield limit - used + _cached(folder, names[2:])


def _cached(folder: Path, names: tuple[str, ...]) -> int:
    lines = (line.split() for line in (text_of(folder / "memory.stat") or "").splitlines())
    return sum(int(words[1]) for words in lines if len(words) == 2 and words[0] in names and words[1].isdigit())
