"""How much memory there is: RAM, swap, and the limit of the container or service that this process runs in."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sfl.profiling.board.files import ROOT, number_in, text_of

_UNLIMITED = 2**60  # version 1 has no word for it and gives a number near 2**63


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
    limits = []
    for line in (text_of(root / "proc/self/cgroup") or "").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0" and not controllers:
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        own = mount / path.lstrip("/")
        # In a container the path may be the host's, and the container's own group is mounted at the top.
        around = [own, *(parent for parent in own.parents if parent.is_relative_to(mount)), mount]
        limits += [limit for folder in around if (limit := number_in(folder / name)) is not None]
    real = [limit for limit in limits if limit < _UNLIMITED]
    return min(real) / 1e6 if real else None
