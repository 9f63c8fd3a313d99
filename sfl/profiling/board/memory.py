"""How much memory there is: RAM, swap, and the limit of the container or service that this process runs in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sfl.profiling.board.files import ROOT, number_in, text_of

UNLIMITED = 2**60  # version 1 has no word for it and gives a number near 2**63


@dataclass(frozen=True)
class BoardMemory:
    """MB (10**6 bytes): RAM in all and available, swap in all and free, and the cgroup's `limit_mb`, None without one."""

    ram_mb: float | None
    available_mb: float | None
    swap_mb: float | None
    swap_free_mb: float | None
    limit_mb: float | None


def board_memory(root: Path = ROOT) -> BoardMemory:
    """From /proc/meminfo and the cgroup."""
    sizes: dict[str, float] = {}
    for line in (text_of(root / "proc/meminfo") or "").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if len(words) == 2 and words[0].isdigit():
            sizes[name] = int(words[0]) * 1024 / 1e6
    return BoardMemory(
        sizes.get("MemTotal"), sizes.get("MemAvailable"), sizes.get("SwapTotal"), sizes.get("SwapFree"), cgroup_limit_mb(root)
    )


def cgroup_limit_mb(root: Path = ROOT) -> float | None:
    """The lowest memory limit of this process's cgroup and those around it, in MB; None where there is none.

    Raspberry Pi OS has the memory controller off unless `cgroup_enable=memory` stands in cmdline.txt: then there is none.
    """
    limits = [
        number_in(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes")) for folder, version in cgroups(root)
    ]
    real = [limit for limit in limits if limit is not None and limit < UNLIMITED]
    return min(real) / 1e6 if real else None


def cgroups(root: Path = ROOT) -> Iterator[tuple[Path, int]]:
    """The folder of each cgroup that may limit this process's memory, its own and those around it, and its version, 1 or 2."""
    for line in (text_of(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            mount, version = root / "sys/fs/cgroup", 2
        elif "memory" in controllers.split(","):
            mount, version = root / "sys/fs/cgroup/memory", 1
        else:
            continue
        own = mount / path.lstrip("/")
        # In a container the path may be the host's, and the container's own group is mounted at the top.
        around = {own, *(parent for parent in own.parents if parent.is_relative_to(mount)), mount}
        yield from ((folder, version) for folder in around)
