"""Another process, looked at from outside: its memory over some seconds and what is mapped into it."""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

from sfl.errors import SettingsError
from sfl.profiling.board.facts import board_facts
from sfl.profiling.board.files import ROOT, text_of
from sfl.profiling.process_memory import process_memory, status_mb
from sfl.profiling.recorder import Moment
from sfl.profiling.result import FORMAT, Part, Peak, Profile
from sfl.profiling.timeline import Series

INTERVAL_S = 0.1
_COMMAND_LENGTH = 100  # characters of it that are told
_HEADER = re.compile(r"^[0-9a-f]+-[0-9a-f]+ (\S{4}) \S+ \S+ (\d+) *(.*)$")
_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt")
PARTS = ("program and libraries", "model files", "other files", "heap", "anonymous", "main stack", "shared memory")


def look_at(pid: int, seconds: float, limit_mb: float | None = None, on_look: Callable[[], None] = lambda: None) -> Profile:
    """Look at process `pid` for `seconds` or until it ends, and once at least.

    Raises `SettingsError` when there is no such process, it belongs to another user, or this system has no /proc.
    """
    _require_readable(pid)
    rss, pss, uss = Series(), Series(), Series()
    started, highest = time.monotonic(), (0.0, 0.0)
    parts: tuple[Part, ...] = ()
    last: Moment | None = None
    while True:
        now = time.monotonic() - started
        memory, mapped, peak = process_memory(pid), mapped_parts(pid), status_mb("VmHWM", pid)
        if not memory.rss_mb or memory.pss_mb is None or memory.uss_mb is None or not mapped:
            break  # it has ended
        for series, mb in ((rss, memory.rss_mb), (pss, memory.pss_mb), (uss, memory.uss_mb)):
            series.add(now, mb)
        parts = mapped
        # glibc's own figures are not to be had from outside.
        last = Moment(now, memory.rss_mb, memory.pss_mb, memory.uss_mb, memory.swap_mb, None, None, None, None)
        highest = max(highest, (memory.rss_mb, now))
        since_start = peak or highest[0]
        on_look()
        if now >= seconds:
            break
        time.sleep(min(INTERVAL_S, max(0.0, seconds - now)))
    if last is None:
        raise SettingsError(f"process {pid} ended before it could be looked at")
    board = board_facts()
    return Profile(
        format=FORMAT,
        kind="process",
        settings={"pid": pid, "command": _command(pid), "peak_since_start_mb": since_start},
        peak=Peak(highest[0], highest[1], "", 0, exact=False),
        parts=parts,
        phases=(),
        moments={"at the last look": last},
        cuda=None,
        energy=None,
        board=board,
        limit_mb=limit_mb,
        spans=(),
        rss=tuple(rss.points),
        pss=tuple(pss.points),
        uss=tuple(uss.points),
    )


def mapped_parts(pid: int | str, root: Path = ROOT) -> tuple[Part, ...]:
    """Resident MB by what is mapped; empty for a process that is gone or may not be read.

    Stacks of threads are anonymous memory like any other; only the main thread's is known by name.
    """
    sizes = dict.fromkeys(PARTS, 0)
    part = ""
    text = text_of(root / "proc" / str(pid) / "smaps")
    for line in (text or "").splitlines():
        if match := _HEADER.match(line):
            part = _part_of(match[1], int(match[2]), match[3])
        elif part and line.startswith("Rss:"):
            sizes[part] += int(line.split()[1])
    return tuple(Part(name, kilobytes * 1024 / 1e6) for name, kilobytes in sizes.items()) if text else ()


def _part_of(permissions: str, inode: int, path: str) -> str:
    name = path.removesuffix(" (deleted)")
    if name == "[heap]":
        return "heap"
    if name.startswith("[stack"):
        return "main stack"
    if name.startswith(("/dev/shm/", "/memfd:", "/SYSV", "/dev/zero")) or (permissions.endswith("s") and not inode):
        return "shared memory"
    if not inode:
        return "anonymous"
    if name.endswith(_WEIGHTS):
        return "model files"
    return "program and libraries" if "x" in permissions or _is_program(name) else "other files"


def _is_program(name: str) -> bool:
    """Whether a file is a library or program, parts of which are mapped without the right to execute."""
    return ".so" in Path(name).suffixes or name.startswith(("/usr/bin/", "/usr/local/bin/", "/bin/")) or os.access(name, os.X_OK)


def _require_readable(pid: int) -> None:
    if not Path("/proc/self/smaps").exists():
        raise SettingsError("--pid needs Linux's /proc, which this system does not have: profile a device half with --model")
    if pid < 1 or not (Path("/proc") / str(pid)).exists():
        raise SettingsError(f"there is no process {pid}: `pgrep -af 'sfl device'` lists the devices that run here")
    try:
        (Path("/proc") / str(pid) / "smaps_rollup").read_bytes()
    except PermissionError:
        raise SettingsError(f"process {pid} may not be read by this user: run this as its owner or as root") from None
    except OSError as error:  # it is ending, or a kernel thread
        raise SettingsError(f"process {pid} has no memory to look at ({error.strerror})") from None


def _command(pid: int) -> str:
    words = (text_of(Path("/proc") / str(pid) / "cmdline") or "").replace("\0", " ").split()
    return textwrap.shorten(" ".join(words), _COMMAND_LENGTH, placeholder=" ...")
