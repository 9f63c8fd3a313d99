"""What the kernel says of a process's memory, in MB (10**6 bytes); None: not measured."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

from sfl.profiling.board.files import ROOT, text_of

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_PRIVATE = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")


@dataclass(frozen=True)
class ProcessMemory:
    """`rss_mb` is what is resident, `pss_mb` the same with shared pages divided among those who share them, `uss_mb` what
    would be free if the process ended, `swap_mb` what was moved to swap."""

    rss_mb: float | None
    pss_mb: float | None
    uss_mb: float | None
    swap_mb: float | None


def process_memory(pid: int | str = "self", root: Path = ROOT) -> ProcessMemory:
    """Exact figures of one moment; the kernel walks all of the process's pages for them (milliseconds)."""
    text = text_of(root / "proc" / str(pid) / "smaps_rollup")
    if text is None:
        return ProcessMemory(resident_mb(pid, root), None, None, None)
    sizes = _kilobytes(text)
    private = sum(sizes.get(name, 0.0) for name in _PRIVATE)
    return ProcessMemory(sizes.get("Rss"), sizes.get("Pss"), private, sizes.get("Swap"))


def resident_mb(pid: int | str = "self", root: Path = ROOT) -> float | None:
    """RSS, read in microseconds; the kernel may lag behind by some hundred KB."""
    words = (text_of(root / "proc" / str(pid) / "statm") or "").split()
    return int(words[1]) * _PAGE / 1e6 if len(words) > 1 else None


def status_mb(name: str, pid: int | str = "self", root: Path = ROOT) -> float | None:
    """A size of /proc/PID/status, such as `VmHWM` (the highest RSS so far) or `RssFile` (resident pages of files)."""
    return _kilobytes(text_of(root / "proc" / str(pid) / "status") or "").get(name)


def seconds_since_start() -> float | None:
    """How long this process has been running, to 10 ms."""
    fields = (text_of(ROOT / "proc/self/stat") or "").rpartition(")")[2].split()  # a name in brackets comes before
    if len(fields) < 20 or not hasattr(time, "CLOCK_BOOTTIME"):
        return None
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _kilobytes(text: str) -> dict[str, float]:
    """`Name:   123 kB` lines, in MB."""
    sizes: dict[str, float] = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB" and words[1].isdigit():
            sizes[words[0].rstrip(":")] = int(words[1]) * 1024 / 1e6
    return sizes
