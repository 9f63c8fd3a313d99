"""Streams that begin and do not go on, many at a time: each is ended, and an honest session beside them is undisturbed."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from sfl.connection_settings import LimitSettings
from sfl.v1.split_pb2 import DeviceMessage, Step
from sfl.v1.split_pb2_grpc import SplitTrainingStub
from sfl.wire.frames import Traffic, frames
from sfl.wire.split import batch_to_wire, open_to_wire
from tests.edge_server.made import Halves
from tests.identity.services import Requests, edge_server, linked

STREAMS = 8  # of each caller
LIMITS = LimitSettings(streams=STREAMS, opening_s=2, stalled_s=2)


def half_open(halves: Halves, caller: int) -> Iterator[Requests]:
    """Streams that say nothing, and one in a session of its own whose step stops after its first piece."""
    opening = DeviceMessage(open=open_to_wire(halves.request(f"attacker-{caller}")))
    head, *rest = frames(DeviceMessage(step=Step(step=1)), batch_to_wire(halves.batch(1)), Traffic())
    assert rest, "a batch of several pieces"
    yield Requests(opening, head)
    for _ in range(STREAMS):  # one more than a caller may have
        yield Requests()


@pytest.mark.parametrize("callers", [10, pytest.param(90, marks=pytest.mark.slow)])  # this server takes 100 connections
def test_half_open_streams_are_ended_and_disturb_nobody(callers: int, tmp_path: Path) -> None:
    alone = Halves()
    session = alone.engine.open(alone.request("honest"), alone.initial)
    with edge_server(tmp_path, None, LIMITS) as (address, halves, guard):
        link = linked(address, halves.request("honest"))
        channels = [grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),)) for _ in range(callers)]
        held: list[Requests] = []
        calls: list[Any] = []
        started, step, slowest_s, most = time.monotonic(), 0, 0.0, 0
        try:
            for number, channel in enumerate(channels):
                for requests in half_open(halves, number):
                    held.append(requests)
                    calls.append(SplitTrainingStub(channel).Train(requests, timeout=60))
                assert next(calls[-1 - STREAMS]).WhichOneof("body") == "opened"
            while any(call.is_active() for call in calls) or step < 20:
                step += 1
                began = time.monotonic()
                found = link.step(step, 0, halves.batch(step)).loss
                slowest_s, most = max(slowest_s, time.monotonic() - began), max(most, len(guard._calls))
                assert found == alone.engine.step(session, step, 0, alone.batch(step)).loss
                assert time.monotonic() - started < 60
            ended_s = time.monotonic() - started
        finally:
            for each in held:
                each.close()
            for channel in channels:
                channel.close()
            link.hang_up()
        codes = Counter(call.code().name for call in calls)
        print(
            f"{len(calls)} half-open streams, {most} at a time, {dict(codes)} within {ended_s:.1f} s; {step} steps beside them,"
            f" the slowest {slowest_s:.2f} s"
        )
        assert ended_s < 20 and slowest_s < 2, "far more than the limits, or a step beside nobody, take"
        assert codes["UNAVAILABLE"] == callers, "the one that was too many of each"
        assert codes["DEADLINE_EXCEEDED"] == callers * STREAMS
        deadline = time.monotonic() + 10
        while guard._calls:
            assert time.monotonic() < deadline, "calls were left open"
            time.sleep(0.01)
