"""Halves on their way, when some of them cannot be sent."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from typing import Any, cast

import pytest

from sfl.adapters.state import AdapterState
from sfl.edge_server.uploads import HalfUploads, TakenHalf
from sfl.errors import BusyError, RefusedError, UnknownMemberError, UnreachableError
from sfl.v1.federation_pb2 import UpdateHeader
from sfl.wire.federation import FederationClient


class Federation:
    """Each try of a submission ends when a test says so, as it says."""

    def __init__(self) -> None:
        self.tries: Counter[str] = Counter()
        self._ends: dict[tuple[str, int], threading.Event] = {}
        self._failed: set[tuple[str, int]] = set()

    def _end(self, submission: str, number: int) -> threading.Event:
        return self._ends.setdefault((submission, number), threading.Event())

    def submit(self, header: UpdateHeader, state: AdapterState) -> None:
        self.tries[header.submission] += 1
        one = header.submission, self.tries[header.submission]
        assert self._end(*one).wait(5)
        if one in self._failed:
            raise UnreachableError("it is away")

    async def begun(self, submission: str, number: int) -> None:
        for _ in range(500):
            if self.tries[submission] >= number:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{submission} is not tried for time number {number}")

    async def ends(self, submission: str, number: int, fails: bool = False) -> None:
        await self.begun(submission, number)
        if fails:
            self._failed.add((submission, number))
        self._end(submission, number).set()
        await asyncio.sleep(0.05)


def half(submission: str) -> TakenHalf:
    return TakenHalf("pi", submission, 0, {})


def run(work: Any) -> None:
    async def both() -> None:
        federation = Federation()
        await work(federation, HalfUploads(cast(FederationClient, federation)))

    asyncio.run(both())


def test_the_end_of_a_session_waits_for_a_whole_try_of_its_own() -> None:
    async def work(federation: Federation, uploads: HalfUploads) -> None:
        uploads.start(half("s/1"))
        await federation.begun("s/1", 1)
        finishing = asyncio.create_task(uploads.finish("pi"))
        await federation.ends("s/1", 1, fails=True)  # soon after the session's end, and long after its own beginning
        await federation.ends("s/1", 2)
        await asyncio.wait_for(finishing, 5)
        assert not uploads.unsent("pi")

    run(work)


def test_what_is_tried_again_while_a_session_ends_is_said_to_have_failed() -> None:
    async def work(federation: Federation, uploads: HalfUploads) -> None:
        uploads.start(half("s/1"))
        uploads.start(half("s/2"))
        await federation.ends("s/1", 1, fails=True)
        uploads.start_unsent()
        await federation.begun("s/1", 2)
        assert federation.tries == {"s/1": 2}
        finishing = asyncio.create_task(uploads.finish("pi"))
        await asyncio.sleep(0.05)
        await federation.ends("s/1", 2, fails=True)
        await federation.ends("s/1", 3, fails=True)
        uploads.start_unsent()
        with pytest.raises(RefusedError, match="it is away"):
            await asyncio.wait_for(finishing, 5)
        await federation.ends("s/1", 4)
        await federation.ends("s/2", 1)
        assert not uploads.unsent("pi")

    run(work)


def test_a_device_whose_halves_cannot_be_sent_holds_nobody_up() -> None:
    async def work(federation: Federation, uploads: HalfUploads) -> None:
        for number in range(40):
            uploads.start(half(f"s/{number}"))
        good = TakenHalf("good", "g/1", 0, {})
        uploads.start(good)
        await federation.ends("g/1", 1)
        assert not uploads.unsent("good")
        for number in range(40):  # one after another, in order
            await federation.begun(f"s/{number}", 1)
            assert sum(federation.tries.values()) == number + 2
            federation._end(f"s/{number}", 1).set()
        while uploads.unsent("pi"):
            await asyncio.sleep(0.01)

    run(work)


def test_a_device_has_only_so_many_halves_that_wait() -> None:
    async def work(federation: Federation, uploads: HalfUploads) -> None:
        for number in range(16):
            uploads.require_room("pi")
            uploads.start(half(f"s/{number}"))
        with pytest.raises(BusyError, match="16 halves of submissions of pi wait here"):
            uploads.require_room("pi")
        uploads.require_room("good")
        await federation.ends("s/0", 1)
        uploads.require_room("pi")
        for number in range(1, 16):
            federation._end(f"s/{number}", 1).set()

    run(work)


class Forgetful:
    """Knows no device until it has `joined`."""

    def __init__(self) -> None:
        self.joined = False
        self.tries = 0

    def submit(self, header: UpdateHeader, state: AdapterState) -> None:
        self.tries += 1
        if not self.joined:
            raise UnknownMemberError("'pi' has not joined this federation (any more)")


def test_halves_of_a_device_that_nobody_knows_wait_for_it_and_not_for_ever(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        federation = Forgetful()
        uploads = HalfUploads(cast(FederationClient, federation), unknown_s=0.3)
        uploads.start(half("s/1"))
        uploads.start(half("s/2"))
        while uploads._running:
            await asyncio.sleep(0.01)
        tried = federation.tries
        uploads.start_unsent()
        await asyncio.sleep(0.05)
        assert federation.tries == tried == 2, "it may have joined again meanwhile; then nothing is tried until it is back"
        uploads.start(half("s/3"))
        await asyncio.sleep(0.05)
        federation.joined = True
        while uploads.unsent("pi"):
            await asyncio.sleep(0.01)
        federation.joined = False
        uploads.start(half("s/4"))
        await asyncio.sleep(0.05)
        uploads.sweep(0.01, ["pi"])
        uploads.sweep(60, [])
        assert uploads.unsent("pi")
        uploads.sweep(0.01, [])
        assert not uploads.unsent("pi") and "s/4 could not be sent for 0.01 s: it is lost" in caplog.text
        while uploads._running:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(work(), 10))
