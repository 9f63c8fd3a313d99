"""The link meter on scripted transfers, and what the federation's client tells it of real ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.device.link_meter import LinkMeter, Upload
from sfl.errors import RefusedError
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server
from sfl.wire.adapters import to_tensors
from sfl.wire.federation import FederationClient
from sfl.wire.frames import Traffic, frames

STATE: AdapterState = {AdapterKey(0, "q", "A"): np.ones((64, 1024), dtype="f4")}
SIZE = 64 * 1024 * 4


def meter(*uploads: tuple[int, float], round_trip_s: float = 0.0) -> LinkMeter:
    made = LinkMeter()
    made.answered(round_trip_s)
    for size, seconds in uploads:
        made.uploaded(size, seconds, 0)
    return made


def test_nothing_is_claimed_before_the_first_upload() -> None:
    empty = LinkMeter()
    empty.answered(0.2)
    assert (empty.latest, empty.bytes_per_s, empty.upload_s(1000), empty.report()) == (None, None, None, None)
    assert empty.round_trip_s == 0.2


def test_the_round_trip_is_told_from_the_transfer() -> None:
    link = meter((1000, 1.5), round_trip_s=0.5)
    assert link.bytes_per_s == pytest.approx(1000)
    assert link.upload_s(1000) == pytest.approx(1.5)
    assert link.upload_s(4000) == pytest.approx(4.5)


def test_an_upload_that_is_all_round_trip_is_foreseen_all_the_same() -> None:
    for round_trip_s in (0.5, 0.499):
        predicted = meter((1000, 0.5), round_trip_s=round_trip_s).upload_s(1000)
        assert predicted is not None
        assert 0.5 <= predicted <= 0.55


def test_the_shortest_round_trip_counts_until_it_is_old() -> None:
    link = LinkMeter()
    for seconds in (0.3, 0.1, *[0.2] * 8):
        link.answered(seconds)
    assert link.round_trip_s == 0.1
    link.answered(0.2)
    assert link.round_trip_s == 0.1
    link.answered(0.2)
    assert link.round_trip_s == 0.2


@given(st.floats(1, 1000), st.integers(0, 4), st.integers(2, 5))
def test_one_outlier_does_not_matter(times: float, place: int, uploads: int) -> None:
    seconds = [1.0] * uploads
    seconds[place % uploads] = times
    assert meter(*((1000, each) for each in seconds)).upload_s(1000) == pytest.approx(1.0)


def test_a_link_that_changes_is_followed() -> None:
    link = meter(*[(1000, 1.0)] * 9)
    found = []
    for _ in range(6):
        link.uploaded(1000, 10.0, 0)
        found.append(link.upload_s(1000))
    assert found == pytest.approx([1.0, 13 / 4, 22 / 4, 31 / 4, 10.0, 10.0])  # the mean without the slowest of the last five
    for _ in range(5):
        link.uploaded(1000, 1.0, 0)
    assert link.upload_s(1000) == pytest.approx(1.0)


def test_failures_slow_the_link_down_by_their_time() -> None:
    link = meter(*[(1000, 1.0)] * 2)
    assert link.report() == pb.Link(bytes_per_s=1000, round_trip_s=0)
    for _ in range(5):
        link.uploaded(1000, 4.0, 3)
    assert link.latest == Upload(1000, 4.0, 3)
    report = link.report()
    assert report is not None
    assert report.bytes_per_s == pytest.approx(250)


@given(
    st.lists(st.tuples(st.integers(1, 10**9), st.floats(0, 1e4)), min_size=1, max_size=12),
    st.lists(st.floats(0, 1e3), max_size=12),
)
def test_estimates_are_numbers_whatever_happens(uploads: list[tuple[int, float]], round_trips: list[float]) -> None:
    link = meter(*uploads)
    for seconds in round_trips:
        link.answered(seconds)
    sizes = (1, 10**6, 10**9)
    predicted = [link.upload_s(size) for size in sizes]
    assert all(value is not None and 0 <= value < 1e15 for value in predicted)
    assert predicted == sorted(predicted)  # type: ignore[type-var]


class Server(FederationServicer):  # type: ignore[misc]
    """`submit` says what becomes of each submission; a version begins after `answer_s`, and its bytes come `flow_s` later."""

    def __init__(self, submit: Callable[[int, Any], None], answer_s: float, flow_s: float) -> None:
        self.submits = 0
        self._submit, self._answer_s, self._flow_s = submit, answer_s, flow_s

    def Submit(self, requests: Iterator[pb.AdapterMessage], context: Any) -> pb.SubmitReply:
        self.submits += 1
        for _ in requests:
            pass
        self._submit(self.submits, context)
        return pb.SubmitReply()

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.AdapterMessage]:
        time.sleep(self._answer_s)
        context.send_initial_metadata(())
        time.sleep(self._flow_s)
        yield from frames(pb.AdapterMessage(version=pb.VersionHeader(version=0)), to_tensors(STATE), Traffic())


@contextmanager
def client_of(
    submit: Callable[[int, Any], None] = lambda number, context: None, answer_s: float = 0.0, flow_s: float = 0.0
) -> Iterator[tuple[FederationClient, LinkMeter]]:
    server, link = grpc.server(ThreadPoolExecutor(4)), LinkMeter()
    add_FederationServicer_to_server(Server(submit, answer_s, flow_s), server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    client = FederationClient(address, "device-1", 5, 30, link)
    try:
        yield client, link
    finally:
        client.close()
        server.stop(0)


def header() -> pb.UpdateHeader:
    return pb.UpdateHeader(submission="1", device="device-1", half=pb.DEVICE)


def test_the_client_tells_of_real_uploads() -> None:
    with client_of(lambda number, context: time.sleep(0.3)) as (client, link):
        client.submit(header(), STATE)
        assert link.latest is not None
        assert (link.latest.size, link.latest.failures) == (SIZE, 0)
        assert 0.3 <= link.latest.seconds < 2


def test_the_client_tells_of_tries_that_failed_and_of_their_time() -> None:
    def submit(number: int, context: Any) -> None:
        if number < 3:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")

    with client_of(submit) as (client, link):
        client.submit(header(), STATE)
        assert link.latest is not None
        assert (link.latest.size, link.latest.failures) == (SIZE, 2)
        assert link.latest.seconds > 0.16 + 0.32  # the pauses, which are 0.2 and 0.4 s give or take a fifth
        client.submit(header(), STATE)
        assert link.latest.failures == 0


def test_an_upload_that_was_refused_is_none() -> None:
    with client_of(lambda number, context: context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no")) as (client, link):
        with pytest.raises(RefusedError):
            client.submit(header(), STATE)
        assert link.latest is None


def test_the_client_tells_of_round_trips_without_what_follows() -> None:
    with client_of(answer_s=0.1, flow_s=0.5) as (client, link):
        began = time.monotonic()
        client.fetch(0)
        assert time.monotonic() - began >= 0.6
        assert 0.1 <= link.round_trip_s < 0.5
