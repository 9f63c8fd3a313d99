"""The federation client against a server that falls silent, refuses or never gets anywhere: every wait ends, with a reason."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from sfl.errors import RefusedError, SflError, UnreachableError
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationServicer, add_FederationServicer_to_server
from sfl.wire.federation import FederationClient

PUBLISHED = pb.Event(published=pb.Published(version=1))


class Server(FederationServicer):  # type: ignore[misc]
    """Lets everybody join, publishes version 1, and is silent from then on; `leave` and `watch` say what else it does."""

    def __init__(self, watch: Callable[[int, Any], None], leave: Callable[[Any], None]) -> None:
        self.watches = self.refused = 0
        self.away = False
        self.over = threading.Event()
        self.fetched: list[pb.FetchRequest] = []
        self._watch, self._leave = watch, leave

    def Join(self, request: pb.JoinRequest, context: Any) -> pb.JoinReply:
        return pb.JoinReply()

    def Watch(self, request: pb.WatchRequest, context: Any) -> Iterator[pb.Event]:
        if self.away:
            self.refused += 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "away")
        self.watches += 1
        context.add_callback(self.over.set if self.watches > 2 else lambda: None)
        yield PUBLISHED
        self._watch(self.watches, context)
        self.over.wait(10)

    def Fetch(self, request: pb.FetchRequest, context: Any) -> Iterator[pb.AdapterMessage]:
        self.fetched.append(request)
        yield pb.AdapterMessage(version=pb.VersionHeader(version=5 if request.newest else request.version))

    def Leave(self, request: pb.LeaveRequest, context: Any) -> pb.LeaveReply:
        self._leave(context)
        return pb.LeaveReply()


@contextmanager
def joined(
    watch: Callable[[int, Any], None] = lambda number, context: None,
    leave: Callable[[Any], None] = lambda context: None,
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[FederationClient, Server]]:
    server, servicer = grpc.server(ThreadPoolExecutor(8)), Server(watch, leave)
    add_FederationServicer_to_server(servicer, server)
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    client = FederationClient(address, "device-1", 5, 30, stopping=stopping)
    try:
        client.join(pb.JoinRequest(name="device-1", rank=2))
        assert client.version(1, 5) == 1
        yield client, servicer
    finally:
        client.close()
        servicer.over.set()
        server.stop(0)


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not ready() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ready()


def failure_of(ask: Callable[[], object], end: Callable[[], object]) -> SflError:
    """What `ask`, in a thread, ends with soon after `end`."""
    found: list[SflError] = []

    def work() -> None:
        try:
            ask()
        except SflError as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    end()
    thread.join(2)
    assert not thread.is_alive()
    return found[0]


def test_close_ends_whoever_waits() -> None:
    with joined() as (client, _):
        error = failure_of(lambda: client.agreement(600), client.close)
        assert isinstance(error, UnreachableError)
        assert "the connection to the federation server was closed" in str(error)


def test_close_ends_whoever_tries_again() -> None:
    with joined(leave=lambda context: context.abort(grpc.StatusCode.UNAVAILABLE, "later")) as (client, _):
        assert "was closed" in str(failure_of(client.leave, client.close))


def test_a_watch_that_falls_silent_is_begun_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("sfl.wire.federation.SILENCE_S", 0.3)
    with caplog.at_level(logging.WARNING, "sfl"), joined() as (client, server):
        deadline = time.monotonic() + 5
        while server.watches < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.watches == 2
        assert client.newest == 1
    assert "the federation server was silent for 0.3 s; watching again in 1 s" in caplog.text


def test_that_the_server_has_stopped_is_said_once_and_that_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sfl"), joined() as (client, server):
        wait = client._closed.wait
        client._closed.wait = lambda timeout=None: wait(0.02)  # type: ignore[method-assign]  # in place of a second and more
        server.away = True
        server.over.set()  # the watch ends in order
        until(lambda: server.refused > 2)
        server.over.clear()
        server.away = False
        until(lambda: "is back" in caplog.text)
    said = [record.getMessage() for record in caplog.records if "the federation server" in record.getMessage()]
    assert said == ["the federation server has stopped; watching again in 1 s", "the federation server is back"]


def test_who_is_to_stop_does_not_try_again_and_says_what_failed(caplog: pytest.LogCaptureFixture) -> None:
    asked = []

    def leave(context: Any) -> None:
        asked.append(1)
        context.abort(grpc.StatusCode.UNAVAILABLE, "later")

    with (
        caplog.at_level(logging.WARNING, "sfl"),
        joined(leave=leave, stopping=lambda: bool(asked)) as (client, _),
        pytest.raises(UnreachableError, match=r"the federation server is out of reach \(UNAVAILABLE: later\); gave up"),
    ):
        client.leave()
    assert len(asked) == 1
    assert "trying again" not in caplog.text


def test_a_watch_that_has_ended_is_told_to_whoever_looks(caplog: pytest.LogCaptureFixture) -> None:
    refuse = threading.Event()

    def watch(number: int, context: Any) -> None:
        refuse.wait(10)
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "the run was called off")

    with caplog.at_level(logging.ERROR, "sfl"), joined(watch) as (client, _):
        assert (client.newest, client.finished) == (1, False)
        error = failure_of(lambda: client.version(2, 600), refuse.set)
        assert isinstance(error, RefusedError)
        for look in (lambda: client.newest, lambda: client.finished):
            with pytest.raises(RefusedError, match="the run was called off"):
                look()
    assert "the watch has ended: the federation server refused: the run was called off" in caplog.text


def test_a_member_fetches_at_the_rank_that_it_joined_with_unless_told_another() -> None:
    with joined() as (client, server):
        assert client.fetch(1, 0, 3) == client.fetch(1, 2, rank=0) == client.fetch(0, rank=4) == {}
        assert client.fetch_newest(3) == (5, {}), "whatever it has heard of"
    assert [(asked.version, asked.newest, asked.first_layer, asked.last_layer, asked.rank) for asked in server.fetched] == [
        (1, False, 0, 3, 2),
        (1, False, 2, 0, 0),
        (0, False, 0, 0, 4),
        (0, True, 0, 3, 2),
    ]
