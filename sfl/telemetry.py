"""The one logger, the metrics file with those who listen to it, and the process's own figures."""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

log = logging.getLogger("sfl")

LogFormat = Literal["text", "json"]
Listener = Callable[[str, Mapping[str, Any]], None]
"""Hears each event of a daemon as it happens: its name and its fields."""

_peak_before_restart = 0.0  # MB

_NEEDLESS = "Failed to load CPU gemm_4bit_forward from kernels-community"  # a faster kernel for nf4, which nothing here needs
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: not str(record.msg).startswith(_NEEDLESS))


def configure_logging(level: str = "INFO", form: LogFormat = "text", daemon: str = "") -> None:
    """Send the log to standard error, one line a record, at `level` (a name that `logging` knows).

    As "json" each line is an object that names the `daemon`; see `JsonFormatter`.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter(daemon) if form == "json" else text)
    log.handlers[:] = [handler]
    log.setLevel(level.upper())
    log.propagate = False


def counted(count: int, one: str, several: str) -> str:
    """A number with its noun, for a sentence."""
    return f"{count} {one if count == 1 else several}"


def is_structured() -> bool:
    """Whether the log is made of JSON objects."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in log.handlers)


class JsonFormatter(logging.Formatter):
    """One JSON object a record: `time` (ISO 8601, UTC), `level`, `daemon`, `message`, and `fields`.

    `template` is the message before its values were put in, the same for all records of one kind. `fields` are what the caller
    gave as `extra={"fields": {...}}`; `error` is the number of an error that is being handled, `traceback` where it arose.
    """

    def __init__(self, daemon: str) -> None:
        super().__init__()
        self._daemon = daemon

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "daemon": self._daemon,
            "message": record.getMessage(),
            "template": str(record.msg),
            "fields": dict(getattr(record, "fields", {})),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = getattr(record.exc_info[1], "code", type(record.exc_info[1]).__name__)
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


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


def _ends_with_line(path: Path) -> bool:
    """Whether the last line of a file is whole, as it is not when the power went while it was written."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 1))
        return file.read() in (b"", b"\n")


class MetricsWriter:
    """Appends events to `metrics.jsonl`, one JSON object a line, each with its Unix time `t` in seconds.

    A line is written at once, so that whoever follows the file sees it and a killed process loses nothing. Where the disk is full
    events are lost, which is logged, and nothing else comes of it. With `path=None` nothing is kept (tests, simulation).
    `listeners` hear each event, in the thread that writes it.
    """

    def __init__(self, path: Path | None, *listeners: Listener) -> None:
        self._file = None
        self._listeners = list(listeners)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)
            self._torn = not _ends_with_line(path)  # the last line has no end
            self._full = False

    def listen(self, listener: Listener) -> None:
        """Have `listener` hear every event from now on."""
        self._listeners.append(listener)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; `fields` must be JSON-serialisable."""
        if self._file is not None:
            line = (json.dumps({"event": event, "t": round(time.time(), 4), **fields}) + "\n").encode()
            self._append(self._file, b"\n" + line if self._torn else line)
        for listener in self._listeners:
            listener(event, fields)

    def _append(self, file: FileIO, data: bytes) -> None:
        try:
            written = file.write(data) or 0
        except OSError as error:
            if not self._full:
                log.error("events are lost, as %s cannot be written: %s", file.name, error.strerror or error)
            self._full = True
        else:  # of a line that does not fit, the beginning may be there
            self._torn, self._full = written < len(data), False

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
