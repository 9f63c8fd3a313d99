"""Locks between processes that share a cache: one writes an entry, or many use it. They end with the process, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType

from sfl.errors import UnreachableError
from sfl.telemetry import log

_PAUSE_S, _SAY_EVERY_S = 0.1, 10.0


class FileLock:
    """Held from its making (`try_lock`, `wait_for_lock`) until `release`, or the end of a `with` block."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def try_lock(path: Path, shared: bool = False) -> FileLock | None:
    """The lock `path` for oneself, or `shared` with others that share it; None while somebody else is in the way."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return FileLock(descriptor)


def wait_for_lock(path: Path, wait_s: float, what: str, shared: bool = False) -> FileLock:
    """`try_lock` until it succeeds; `what` says what it is about. Raises `UnreachableError` after `wait_s` seconds."""
    started = said = time.monotonic()
    while (lock := try_lock(path, shared)) is None:
        now = time.monotonic()
        if now - started > wait_s:
            raise UnreachableError(f"waited {wait_s:g} s for {what}, which another process has taken ({path}); gave up")
        if now - said > _SAY_EVERY_S:
            said = now
            log.info("waiting for %s, which another process has taken (%.0f of %.0f s)", what, now - started, wait_s)
        time.sleep(_PAUSE_S)
    return lock
