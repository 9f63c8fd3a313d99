"""The one compute worker: whatever the devices ask for is computed one thing at a time, in a chosen order."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from sfl.errors import SflError
from sfl.telemetry import log

Result = TypeVar("Result")


@dataclass(frozen=True)
class Job:
    """Something to compute for a device cut at `cut`; `arrived` is a monotonic time in seconds."""

    cut: int
    compute: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


ServeOrder = Callable[[Sequence[Job]], int]
"""Which of the waiting jobs, in the order of their arrival and never none, is next: its index."""


def arrival(waiting: Sequence[Job]) -> int:
    """First come, first served."""
    return 0


def longest_tail(waiting: Sequence[Job]) -> int:
    """The device that has most left to do afterwards, which is the one with the deepest cut; the first of equals."""
    return max(range(len(waiting)), key=lambda index: (waiting[index].cut, -index))


ORDERS: dict[Literal["arrival", "longest-tail"], ServeOrder] = {"arrival": arrival, "longest-tail": longest_tail}


class ComputeWorker:
    """A thread that computes jobs in `order`. It sleeps while there are none."""

    def __init__(self, order: ServeOrder) -> None:
        self._order = order
        self._waiting: list[Job] = []
        self._changed = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._serve, name="compute", daemon=True)
        self._thread.start()

    def submit(self, cut: int, compute: Callable[[], Result]) -> Future[Result]:
        """Queue `compute`; its result or exception arrives in the future. A future cancelled in time is not computed."""
        job = Job(cut, compute)
        with self._changed:
            if self._stopped:
                raise SflError("the edge server is shutting down")
            self._waiting.append(job)
            self._changed.notify()
        return job.future

    def stop(self) -> None:
        """Finish the job at hand, cancel the others and end the thread."""
        with self._changed:
            self._stopped = True
            for job in self._waiting:
                job.future.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            if not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(job.compute())
            except Exception as error:  # noqa: BLE001  # whoever waits for the future gets it
                job.future.set_exception(error)

    def _next(self) -> Job | None:
        with self._changed:
            while not self._waiting and not self._stopped:
                self._changed.wait()
            return None if self._stopped else self._take()

    def _take(self) -> Job:
        try:
            return self._waiting.pop(self._order(self._waiting))
        except Exception as error:  # noqa: BLE001  # an order is somebody's own code, and all devices depend on this thread
            log.error("the serve order failed (%s: %s); the job that came first is served", type(error).__name__, error)
            return self._waiting.pop(0)
