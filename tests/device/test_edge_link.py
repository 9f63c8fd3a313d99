"""The link to the edge on a network that breaks, stalls and crawls."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import edge_half
from sfl.device.edge_link import GrpcEdgeLink
from sfl.edge_server import service
from sfl.errors import SessionLostError, UnreachableError
from tests.edge_server.made import Halves, Network, ServedEdge, eventually, network, served

STEPS = 6


@pytest.fixture(scope="module")
def expected() -> list[float]:
    """The losses of a run that nothing disturbs."""
    halves = Halves()
    session = halves.engine.open(halves.request(), halves.initial)
    return [halves.engine.step(session, number, 0, halves.batch(number)).loss for number in range(1, STEPS + 1)]


@pytest.fixture
def edge() -> Iterator[ServedEdge]:
    with served(Halves()) as made:
        yield made


@pytest.fixture
def net(edge: ServedEdge) -> Iterator[Network]:
    with network(edge.address) as made:
        yield made


@contextlib.contextmanager
def linked(edge: ServedEdge, address: str, give_up_s: float = 15.0, **more: Any) -> Iterator[GrpcEdgeLink]:
    link = GrpcEdgeLink(address, edge.halves.request(), 5, give_up_s, **more)
    try:
        link.begin()
        yield link
    finally:
        link.hang_up()


def step(edge: ServedEdge, link: GrpcEdgeLink, number: int, version: int = 0) -> float:
    return link.step(number, version, edge.halves.batch(number)).loss


def test_cut_between_steps_and_in_the_middle_of_one(
    edge: ServedEdge, net: Network, expected: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    losses = []
    with caplog.at_level(logging.WARNING, "sfl"), linked(edge, net.address) as link:
        for number in range(1, STEPS + 1):
            if number == 3:
                net.cut()
            if number == 5:
                net.left = 1500  # of the step's 2.5 kB
            losses.append(step(edge, link, number))
        assert net.connections >= 3
        link.close()
    assert losses == expected
    assert edge.service.steps == STEPS
    assert "out of reach" in caplog.text
    assert "opening the session again in" in caplog.text


def test_an_edge_that_stops_serving_and_comes_back_within_the_session(edge: ServedEdge, expected: list[float]) -> None:
    losses = []
    with linked(edge, edge.address) as link:
        for number in range(1, STEPS + 1):
            if number == 3:
                edge.stop()
                threading.Timer(0.4, edge.start).start()
            losses.append(step(edge, link, number))
        link.close()
    assert losses == expected


@pytest.mark.parametrize(
    ("cut_after_s", "answer_after_s"),
    [
        pytest.param((0.7,), 1.0, id="the time that an answer takes is no time without an edge"),
        pytest.param((0.3, 0.9, 1.5), 2.0, id="a way that breaks now and then is each time the first"),
    ],
)
def test_only_time_without_an_edge_counts(
    edge: ServedEdge, net: Network, monkeypatch: pytest.MonkeyPatch, cut_after_s: tuple[float, ...], answer_after_s: float
) -> None:
    monkeypatch.setattr(service, "HEARTBEAT_S", 0.05)
    edge.federation.open.clear()
    with linked(edge, net.address, give_up_s=0.5) as link:
        step(edge, link, 1)
        link.submit("s/1", 0)
        for after_s in cut_after_s:
            threading.Timer(after_s, net.cut).start()
        threading.Timer(answer_after_s, edge.federation.open.set).start()
        link.close()
    assert len(edge.federation.submitted) == 1 and net.connections == 1 + len(cut_after_s)


def test_a_lost_answer_is_asked_for_again_without_training_twice(
    edge: ServedEdge, net: Network, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = edge.halves.engine
    done: list[int] = []
    real = engine.step

    def cutting(session: Any, number: int, *args: Any) -> Any:
        result = real(session, number, *args)
        done.append(number)
        if done.count(4) == 1 and number == 4:
            net.cut()  # the step is done, its answer is lost
        return result

    monkeypatch.setattr(engine, "step", cutting)
    with linked(edge, net.address) as link:
        assert [step(edge, link, number) for number in range(1, STEPS + 1)] == expected
    assert done == [1, 2, 3, 4, 4, 5, 6]
    assert edge.service.steps == STEPS


def test_lost_answers_to_submissions_and_adoptions(edge: ServedEdge, net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = edge.halves.engine
    newer = edge.federation.publish(1)
    lost = []

    def cut_once(name: str) -> None:
        real = getattr(engine, name)

        def cutting(*args: Any) -> Any:
            result = real(*args)
            if name not in lost:
                lost.append(name)
                net.cut()
            return result

        monkeypatch.setattr(engine, name, cutting)

    cut_once("take_progress")
    cut_once("adopt")
    with linked(edge, net.address) as link:
        for number in (1, 2):
            step(edge, link, number)
        session = engine.resume(edge.halves.request())
        assert session is not None
        before, begin = session.adapter.values(), edge_half(edge.halves.initial, 2)
        link.submit("device-1/1", 0)
        link.adopt(1, False)
        after = session.adapter.values()
        link.close()
    assert lost == ["take_progress", "adopt"]
    ((header, progress),) = edge.federation.submitted
    assert header.submission == "device-1/1"
    assert all(np.array_equal(progress[key], before[key] - begin[key]) for key in begin)
    assert all(np.array_equal(after[key], newer[key]) for key in after)


def test_an_edge_that_was_restarted_without_files_says_that_the_session_is_lost(edge: ServedEdge) -> None:
    with linked(edge, edge.address) as link:
        step(edge, link, 1)
        edge.stop()
        edge.fresh_service(Halves())
        edge.start()
        with pytest.raises(SessionLostError, match=r"the edge server knows nothing of this device's session.*is lost"):
            step(edge, link, 2)


def test_an_edge_restarted_before_the_first_step_does_no_harm(edge: ServedEdge, expected: list[float]) -> None:
    with linked(edge, edge.address) as link:
        edge.stop()
        edge.fresh_service(Halves())
        edge.start()
        assert step(edge, link, 1) == expected[0]


def test_an_edge_that_is_gone_for_good(edge: ServedEdge, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "sfl"), linked(edge, edge.address, give_up_s=1.0) as link:
        step(edge, link, 1)
        edge.stop()
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"the edge server is out of reach .*; gave up after"):
            step(edge, link, 2)
        assert time.monotonic() - started < 4
    assert "opening the session again" in caplog.text
    edge.start()


def test_a_device_that_is_to_stop_does_not_try_for_long(
    edge: ServedEdge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.device.edge_link._LAST_S", 0.3)
    with caplog.at_level(logging.WARNING, "sfl"), linked(edge, edge.address, stopping=lambda: True) as link:
        step(edge, link, 1)
        edge.stop()
        started = time.monotonic()
        with pytest.raises(UnreachableError, match="gave up after 0 s"):
            step(edge, link, 2)
        assert time.monotonic() - started < 2
    assert "opening the session again" not in caplog.text, "no warning of what is to be expected"
    edge.start()


def test_an_edge_that_falls_silent(edge: ServedEdge, net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfl.device.edge_link.SILENCE_S", 0.4)
    with linked(edge, net.address, give_up_s=1.0) as link:
        step(edge, link, 1)
        net.swallows = True
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"the edge server was silent for 0.4 s; gave up after"):
            step(edge, link, 2)
        assert 0.4 < time.monotonic() - started < 4


def test_a_slow_uplink_is_no_silent_edge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfl.device.edge_link.SILENCE_S", 1.5)
    monkeypatch.setattr("sfl.edge_server.service.HEARTBEAT_S", 0.2)
    with served(Halves(hidden=256)) as edge, network(edge.address) as net, linked(edge, net.address, give_up_s=1.0) as link:
        net.pause_s = 0.005
        started = time.monotonic()
        link.step(1, 0, edge.halves.batch(size=24, tokens=100))  # 2.5 MB in 600 pieces
        assert time.monotonic() - started > 2.5
        assert net.connections == 1


def test_hanging_up_ends_the_threads(edge: ServedEdge) -> None:
    before = {thread.name for thread in threading.enumerate()}
    with linked(edge, edge.address) as link:
        step(edge, link, 1)
        assert "edge-stream" in {thread.name for thread in threading.enumerate()}
    eventually(lambda: "edge-stream" not in {thread.name for thread in threading.enumerate()} - before)
