"""The one logger, the metrics file and the process's own figures."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

log = logging.getLogger("sfl")
_peak_before_restart = 0.0  # MB

_NEEDLESS = "Failed to load CPU gemm_4bit_forward from kernels-community"  # a faster kernel for nf4, which nothing here needs
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: not str(record.msg).startswith(_NEEDLESS))


def configure_logging(level: str = "INFO") -> None:
    """Send the log to standard error, one line a record, at `level` (a name that `logging` knows)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


def counted(count: int, one: str, several: str) -> str:
    """A number with its noun, for a sentence."""
    return f"{count} {one if count == 1 else several}"


def peak_rss_mb() -> float:
    """Highest resident memory of this process so far, in MB (10**6 bytes)."""
    return max(_peak_before_restart, peak_since_restart_mb())


def peak_since_restart_mb() -> float:
    """Highest resident memory since `restart_peak` last did so, or since the start, in MB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    # Not the first choice, as a process inherits its parent's figure.
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return kilobytes * unit / 1e6


def restart_peak() -> bool:
    """Have the kernel count the peak anew from here; whether it could be asked to. `peak_rss_mb` keeps the whole one."""
    global _peak_before_restart
    highest = peak_rss_mb()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    _peak_before_restart = highest
    return True


class MetricsWriter:
    """Appends events to `metrics.jsonl`, one JSON object a line, each with its Unix time `t` in seconds.

    A line is flushed as it is written, so that whoever follows the file sees it at once and a killed process
    loses nothing. With `path=None` nothing is kept (tests, simulation).
    """

    def __init__(self, path: Path | None) -> None:
        self._file = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; `fields` must be JSON-serialisable."""
        if self._file is not None:
            self._file.write(json.dumps({"event": event, "t": round(time.time(), 4), **fields}) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
