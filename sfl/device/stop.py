"""A device that is told to stop: it finishes the step that it is in, if that comes to an end soon."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

from sfl.errors import SflError
from sfl.telemetry import log
from sfl.watching.watch import LAST_S

GRACE_S = 8.0 - LAST_S  # before the last report; container engines wait for 10 before they kill


class Stopped(BaseException):
    """The process was told to stop. No error, so that nothing that handles errors takes it for one."""


class StopSignal:
    """SIGTERM or SIGINT (Ctrl-C) raises `Stopped`, while this is entered: at once where all is kept, and inside `held` after its
    block.

    `grace_s` seconds later, or at a second signal, it is raised again, wherever that is: whatever ends a device, it goes on from
    its last checkpoint.
    Outside a process's main thread nothing is heard.
    """

    def __init__(self, grace_s: float = GRACE_S) -> None:
        self.told = False
        self._grace_s = grace_s
        self._held = False
        self._before: dict[signal.Signals, Any] = {}

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Let the block come to its end first, or to an error; it may look at `told`."""
        self._held = True
        try:
            yield
        except SflError as error:
            if not self.told:
                raise
            log.warning("%s", error)
        finally:
            self._held = False
        if self.told:
            raise Stopped

    @contextlib.contextmanager
    def let_go(self) -> Iterator[None]:
        """A wait inside `held`, which ends at once."""
        self._held = False
        try:
            if self.told:
                raise Stopped
            yield
        finally:
            self._held = True

    def _tell(self, number: int, frame: FrameType | None) -> None:
        again, self.told = self.told, True
        if not again:
            signal.setitimer(signal.ITIMER_REAL, self._grace_s)
        if again or not self._held:
            raise Stopped

    def _late(self, number: int, frame: FrameType | None) -> None:
        raise Stopped

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            handlers = {signal.SIGTERM: self._tell, signal.SIGINT: self._tell, signal.SIGALRM: self._late}
            self._before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._before:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)
