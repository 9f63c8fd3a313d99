"""Halves of submissions on their way from the edge to the federation server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from sfl.adapters.state import AdapterState
from sfl.errors import BusyError, RefusedError, SflError, UnknownMemberError, UnreachableError
from sfl.telemetry import log
from sfl.v1 import federation_pb2
from sfl.wire.federation import FederationClient

_THREADS = 32  # of their own: one is busy for as long as a half is tried, and nothing else may wait for that
_MOST_UNSENT = 16  # halves of one device
_LONGEST_PAUSE_S = 5.0


@dataclass(frozen=True)
class TakenHalf:
    """The edge's half of a submission, once it was set aside."""

    device: str
    submission: str
    version: int
    progress: AdapterState


@dataclass(eq=False)
class _Line:
    """A device's halves that want to be sent, one after another."""

    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    failures: int = 0  # times that one could not be sent
    failure: SflError | None = None  # the last


class HalfUploads:
    """Sends halves on, several at once but one of each device, in their order; called on one event loop, but for `unsent`.

    A half is here until the federation server has it or refuses it. One that could not be sent in the client's time waits, with
    those behind it, for `start_unsent`, the device's next one, or the end of its session. A device that the federation server
    does not know (any more) may join again: its halves are tried for `unknown_s`, without a thread, and then wait for the device
    alone.
    """

    def __init__(self, federation: FederationClient, unknown_s: float = 300.0) -> None:
        self._federation = federation
        self._unknown_s = unknown_s
        self._lines: WeakValueDictionary[str, _Line] = WeakValueDictionary()
        self._threads = ThreadPoolExecutor(_THREADS, "uploads")
        self._unsent: dict[tuple[str, str], TakenHalf] = {}  # by device and submission
        self._since: dict[tuple[str, str], float] = {}  # of each of these, by the monotonic clock
        self._of_session: dict[str, dict[str, asyncio.Task[SflError | None]]] = {}  # by the same, also those that are done
        self._running: dict[tuple[str, str], asyncio.Task[SflError | None]] = {}

    def start(self, half: TakenHalf) -> None:
        """Send a half on, and what could not be sent of the device's before."""
        for each in (*self.unsent(half.device), half):
            self._start(each)

    def start_unsent(self) -> None:
        """Try again what could not be sent, of any device: one that waits for the version that it is for asks for nothing."""
        for key, half in list(self._unsent.items()):
            before = self._of_session.get(half.device, {}).get(half.submission)
            if key not in self._running and before is not None and isinstance(before.result(), UnknownMemberError):
                continue
            self._start(half)

    def _start(self, half: TakenHalf) -> None:
        """Send a half on, unless that has been begun and has not failed for want of an answer."""
        key = half.device, half.submission
        tasks = self._of_session.setdefault(half.device, {})
        before = tasks.get(half.submission)
        if key in self._running or (before is not None and not _waits(before.result())):
            return
        for submission in [each for each, sent in tasks.items() if sent.done() and sent.result() is None]:
            del tasks[submission]  # or they would be as many as the device submits in all
        self._unsent[key] = half
        self._since.setdefault(key, time.monotonic())
        task = asyncio.create_task(self._send(half))
        tasks[half.submission] = self._running[key] = task
        task.add_done_callback(lambda done: self._running.pop(key))

    def knows(self, device: str, submission: str) -> bool:
        """Whether this half is the last or one of the last that were started since the device's session began, or this edge."""
        return submission in self._of_session.get(device, {})

    def require_room(self, device: str) -> None:
        """Raise `BusyError` when as many halves of a device wait here as may."""
        unsent = len(self.unsent(device))
        if unsent >= _MOST_UNSENT:
            raise BusyError(
                f"{unsent} halves of submissions of {device} wait here for the federation server: no more are taken until it has"
                " one of these"
            )

    def unsent(self, device: str) -> list[TakenHalf]:
        """The halves of a device that the federation server has not answered; any thread may ask."""
        return [half for half in list(self._unsent.values()) if half.device == device]

    def end_session(self, device: str) -> None:
        """What becomes of halves of the device's session is not told to its next one; they are sent all the same."""
        self._of_session.pop(device, None)

    def drop(self) -> None:
        """Nobody wants the halves any more that are not sent; those under way will be refused."""
        self._unsent.clear()
        self._since.clear()

    def sweep(self, keep_s: float, in_use: Collection[str]) -> None:
        """Drop what could not be sent for more than `keep_s` seconds, and is of none of these devices."""
        now = time.monotonic()
        for device, submission in [key for key, since in self._since.items() if now - since > keep_s and key[0] not in in_use]:
            log.warning(
                "the edge's half of %s's submission %s could not be sent for %g s: it is lost", device, submission, keep_s
            )
            self._forget((device, submission))

    def _forget(self, key: tuple[str, str]) -> None:
        self._unsent.pop(key, None)
        self._since.pop(key, None)

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
        """Send a half on when its turn has come; returns what kept it from arriving, as nobody asks a device's last upload when
        it never closes."""
        line = self._lines.setdefault(half.device, _Line())
        failures = line.failures
        async with line.turn:
            if line.failures > failures:
                return line.failure  # of one before it, and it would be the same
            error = await self._sent(half)
            if _waits(error):
                line.failures, line.failure = line.failures + 1, error
            else:
                self._forget((half.device, half.submission))
            return error

    async def _sent(self, half: TakenHalf) -> SflError | None:
        header = federation_pb2.UpdateHeader(
            submission=half.submission, device=half.device, half=federation_pb2.EDGE, version=half.version
        )
        loop, began, pause = asyncio.get_running_loop(), time.monotonic(), 0.2
        while (half.device, half.submission) in self._unsent:
            try:
                await loop.run_in_executor(self._threads, self._federation.submit, header, half.progress)
                return None
            except UnknownMemberError as error:
                if time.monotonic() - began + pause > self._unknown_s:
                    log.error(
                        "the edge's half of %s's submission %s waits for its device: %s", half.device, half.submission, error
                    )
                    return error
                log.warning("%s; trying again in %.1f s", error, pause)
            except UnreachableError as error:
                log.error("the edge's half of %s's submission %s waits: %s", half.device, half.submission, error)
                return error
            except SflError as error:
                log.error("the edge's half of %s's submission %s is lost: %s", half.device, half.submission, error)
                return error
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)
        return RefusedError("nobody wants it any more")


def _waits(error: SflError | None) -> bool:
    """Whether a half that this kept from arriving may arrive later."""
    return isinstance(error, (UnreachableError, UnknownMemberError))
