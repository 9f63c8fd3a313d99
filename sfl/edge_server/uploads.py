"""Halves of submissions on their way from the edge to the federation server."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sfl.adapters.state import AdapterState
from sfl.errors import RefusedError, SflError, UnreachableError
from sfl.telemetry import log
from sfl.v1 import federation_pb2
from sfl.wire.federation import FederationClient

_THREADS = 32  # of their own: one is busy for as long as a half is tried, and nothing else may wait for that


@dataclass(frozen=True)
class TakenHalf:
    """The edge's half of a submission, once it was set aside."""

    device: str
    submission: str
    version: int
    progress: AdapterState


class HalfUploads:
    """Sends halves on, several at once; called on one event loop, but for `unsent`.

    A half is here until the federation server has it or refuses it. One that could not be sent in the client's time waits for
    `start_unsent`, the device's next one, or the end of its session.
    """

    def __init__(self, federation: FederationClient) -> None:
        self._federation = federation
        self._threads = ThreadPoolExecutor(_THREADS, "uploads")
        self._unsent: dict[tuple[str, str], TakenHalf] = {}  # by device and submission
        self._of_session: dict[str, dict[str, asyncio.Task[SflError | None]]] = {}  # by the same, also those that are done
        self._running: dict[tuple[str, str], asyncio.Task[SflError | None]] = {}

    def start(self, half: TakenHalf) -> None:
        """Send a half on, and what could not be sent of the device's before."""
        for each in (*self.unsent(half.device), half):
            self._start(each)

    def start_unsent(self) -> None:
        """Try again what could not be sent, of any device: one that waits for the version that it is for asks for nothing."""
        for half in list(self._unsent.values()):
            self._start(half)

    def _start(self, half: TakenHalf) -> None:
        """Send a half on, unless that has been begun and has not failed for want of an answer."""
        key = half.device, half.submission
        tasks = self._of_session.setdefault(half.device, {})
        before = tasks.get(half.submission)
        if key in self._running or (before is not None and not isinstance(before.result(), UnreachableError)):
            return
        for submission in [each for each, sent in tasks.items() if sent.done() and sent.result() is None]:
            del tasks[submission]  # or they would be as many as the device submits in all
        self._unsent[key] = half
        task = asyncio.create_task(self._send(half))
        tasks[half.submission] = self._running[key] = task
        task.add_done_callback(lambda done: self._running.pop(key))

    def knows(self, device: str, submission: str) -> bool:
        """Whether this half is the last or one of the last that were started since the device's session began, or this edge."""
        return submission in self._of_session.get(device, {})

    def unsent(self, device: str) -> list[TakenHalf]:
        """The halves of a device that the federation server has not answered; any thread may ask."""
        return [half for half in list(self._unsent.values()) if half.device == device]

    def end_session(self, device: str) -> None:
        """What becomes of halves of the device's session is not told to its next one; they are sent all the same."""
        self._of_session.pop(device, None)

    def drop(self) -> None:
        """Nobody wants the halves any more that are not sent; those under way will be refused."""
        self._unsent.clear()

    async def finish(self, device: str) -> None:
        """Wait until the federation server has all halves of the device's session.

        Raises `RefusedError` for one that did not reach it, once, though all of the client's time was given to it from now on.
        """
        if under_way := [task for task in self._of_session.get(device, {}).values() if not task.done()]:
            await asyncio.wait(under_way)  # which may be near the end of their time
        for half in self.unsent(device):
            self._start(half)
        tasks = dict(self._of_session.get(device, {}))  # as they are now: those that fail may be begun again meanwhile
        if tasks:
            await asyncio.wait(tasks.values())
        for submission, task in tasks.items():
            if (error := task.result()) is not None:
                self._of_session.get(device, {}).pop(submission, None)
                raise RefusedError(f"a submitted half did not reach the federation server: {error}")

    async def _send(self, half: TakenHalf) -> SflError | None:
        """Send a half on; returns what kept it from arriving, as nobody asks a device's last upload when it never closes."""
        header = federation_pb2.UpdateHeader(
            submission=half.submission, device=half.device, half=federation_pb2.EDGE, version=half.version
        )
        try:
            await asyncio.get_running_loop().run_in_executor(self._threads, self._federation.submit, header, half.progress)
        except UnreachableError as error:
            log.error("the edge's half of %s's submission %s waits: %s", half.device, half.submission, error)
            return error
        except SflError as error:
            log.error("the edge's half of %s's submission %s is lost: %s", half.device, half.submission, error)
            self._unsent.pop((half.device, half.submission), None)
            return error
        self._unsent.pop((half.device, half.submission), None)
        return None
