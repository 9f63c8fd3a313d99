"""Dialling and serving: every wait ends, every failure says why."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat

import grpc
import pytest

from sfl.errors import RefusedError, SettingsError, UnreachableError
from sfl.wire.address import check_address
from sfl.wire.channel import check_listen, dial, error_from, retry, serve, until_silent


class Failure(grpc.RpcError):
    """A failed call as gRPC raises it."""

    def __init__(self, code: grpc.StatusCode, details: str = "why") -> None:
        super().__init__()
        self._code, self._details = code, details

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details


@contextmanager
def listener(family: socket.AddressFamily = socket.AF_INET) -> Iterator[str]:
    """A port in use by something that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), family=family) as taken:
        yield f"127.0.0.1:{taken.getsockname()[1]}"


def bind(address: str) -> str:
    async def work() -> str:
        server, bound = serve(address)
        await server.start()
        await server.stop(0)
        return bound

    return asyncio.run(work())


def test_port_0_becomes_a_real_one() -> None:
    host, port = check_address(bind("127.0.0.1:0"))
    assert host == "127.0.0.1"
    assert port > 0


def test_a_port_in_use_is_named_with_the_reason() -> None:
    with listener() as address, pytest.raises(SettingsError, match=f"cannot listen on {address}: .*in use.*`listen`"):
        bind(address)


def test_a_port_is_looked_at_before_it_is_served_on() -> None:
    check_listen("127.0.0.1:0")
    with listener() as address, pytest.raises(SettingsError, match=f"cannot listen on {address}: .*in use.*`listen`"):
        check_listen(address)


def test_two_servers_never_share_a_port() -> None:
    async def work() -> None:
        server, bound = serve("127.0.0.1:0")
        await server.start()
        try:
            with pytest.raises(SettingsError, match="in use"):
                serve(bound)
        finally:
            await server.stop(0)

    asyncio.run(work())


def test_an_address_of_another_machine_cannot_be_bound() -> None:
    with pytest.raises(SettingsError, match=r"cannot listen on 192.0.2.1:7300: .*assign"):
        bind("192.0.2.1:7300")


@pytest.mark.parametrize(
    "address", ["", "7300", ":7300", "host", "host:", "host:x", "host:-1", "host:65536", "http://host:80", "::1:7300", "host:7 3"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(SettingsError, match="is no address: expected HOST:PORT"):
        check_address(address)
    with pytest.raises(SettingsError, match="no address"):
        dial(address, "the edge server", 1)


def test_addresses_that_are_some() -> None:
    assert check_address("10.0.0.1:7300") == ("10.0.0.1", 7300)
    assert check_address("edge.local:1") == ("edge.local", 1)
    assert check_address("[::1]:7300") == ("[::1]", 7300)


@pytest.mark.parametrize("silent", [False, True])
def test_dial_gives_up_in_time_and_says_what_it_awaited(silent: bool) -> None:
    with listener() as address:
        if not silent:
            address = "127.0.0.1:1"  # nothing listens there
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=f"the edge server at {address} did not answer within 0.5 s"):
            dial(address, "the edge server", 0.5)
        assert 0.4 < time.monotonic() - started < 3


def test_dial_waits_for_a_server_that_comes_later(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        dialled = asyncio.create_task(asyncio.to_thread(dial, address, "the edge server", 15))
        await asyncio.sleep(0.3)
        server, _ = serve(address)
        await server.start()
        (await dialled).close()
        await server.stop(0)

    asyncio.run(work())


def test_retry_returns_what_came_at_last_and_logs_each_failure(caplog: pytest.LogCaptureFixture) -> None:
    outcomes: Iterator[Failure | int] = iter(
        [Failure(grpc.StatusCode.UNAVAILABLE), Failure(grpc.StatusCode.DEADLINE_EXCEEDED), 7]
    )

    def call() -> int:
        outcome = next(outcomes)
        if isinstance(outcome, Failure):
            raise outcome
        return outcome

    with caplog.at_level(logging.WARNING, "sfl"):
        assert retry(call, "the federation server", 10) == 7
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "the federation server is out of reach (UNAVAILABLE: why); trying again in 0.2 s" in caplog.text
    assert "DEADLINE_EXCEEDED" in caplog.text


def test_retry_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    def call() -> None:
        raise Failure(grpc.StatusCode.UNAVAILABLE)

    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"out of reach .*; gave up after"):
        retry(call, "the federation server", 0.7)
    assert 0.1 < time.monotonic() - started < 1.5


def test_who_is_told_to_stop_in_a_pause_does_not_try_again() -> None:
    calls, told = [], []

    def call() -> None:
        calls.append(1)
        raise Failure(grpc.StatusCode.UNAVAILABLE)

    with pytest.raises(UnreachableError, match=r"\(UNAVAILABLE: why\); gave up after"):
        retry(call, "the federation server", 10, told.append, lambda: bool(told))
    assert len(calls) == 1


def test_a_call_that_takes_longer_than_give_up_s_and_then_breaks_is_tried_once_more() -> None:
    calls: list[int] = []

    def call() -> str:
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.5)
            raise Failure(grpc.StatusCode.UNAVAILABLE)
        return "arrived"

    assert retry(call, "the federation server", 0.4) == "arrived"


@pytest.mark.parametrize("code", ["INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "UNIMPLEMENTED", "UNKNOWN"])
def test_a_refusal_is_final(code: str) -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        raise Failure(grpc.StatusCode[code], "the base models differ")

    with pytest.raises(RefusedError, match="the edge server refused: the base models differ"):
        retry(call, "the edge server", 10)
    assert calls == 1


@pytest.mark.parametrize("code", ["UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "ABORTED", "INTERNAL"])
def test_what_may_pass_is_no_refusal(code: str) -> None:
    assert isinstance(error_from(Failure(grpc.StatusCode[code]), "x"), UnreachableError)


class Stream:
    """A call whose messages take so many seconds each, and which breaks once it is cancelled."""

    def __init__(self, pauses: Iterable[float]) -> None:
        self._pauses = iter(pauses)
        self.cancelled = threading.Event()

    def __next__(self) -> float:
        pause = next(self._pauses)
        if self.cancelled.wait(pause):
            raise Failure(grpc.StatusCode.CANCELLED)
        return pause

    def cancel(self) -> None:
        self.cancelled.set()


def test_a_stream_that_falls_silent_is_left_and_one_that_ends_is_not() -> None:
    silent = Stream([0.1, 0.1, 30])
    messages = until_silent(silent, "the edge server", 0.3)
    assert [next(messages), next(messages)] == [0.1, 0.1]
    started = time.monotonic()
    with pytest.raises(UnreachableError, match=r"the edge server was silent for 0\.3 s"):
        next(messages)
    assert 0.25 < time.monotonic() - started < 2
    assert list(until_silent(Stream([0.1, 0]), "the edge server", 0.3)) == [0.1, 0]


def test_how_long_a_message_is_worked_on_is_no_silence() -> None:
    stream = Stream([0, 0, 0])
    for _ in until_silent(stream, "the edge server", 0.1):
        time.sleep(0.3)
    assert not stream.cancelled.is_set()


def test_a_break_is_no_silence() -> None:
    stream = Stream([5])
    threading.Timer(0.1, stream.cancel).start()
    with pytest.raises(Failure):
        next(until_silent(stream, "the edge server", 5))


def test_a_stream_has_one_watcher_which_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[threading.Thread] = []
    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", lambda thread: (started.append(thread), start(thread))[1])
    messages = until_silent(Stream(repeat(0.0)), "the edge server", 60)
    for _ in range(1000):
        next(messages)
    assert len(started) == 1 and started[0].is_alive()
    messages.close()
    started[0].join(5)
    assert not started[0].is_alive()
