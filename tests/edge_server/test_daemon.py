"""The edge server's process around its service: how it ends when the federation server does not take its proposal."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfl.cluster.plan import free_addresses
from sfl.edge_server import daemon
from sfl.errors import RefusedError, UnreachableError
from sfl.settings import EdgeSettings
from sfl.v1.federation_pb2 import ReportRequest
from sfl.wire.channel import check_listen
from sfl.wire.frames import Traffic
from tests.metrics import events
from tests.tiny import save_tiny_model


@pytest.fixture
def settings(tmp_path: Path) -> EdgeSettings:
    (listen,) = free_addresses(1)
    return EdgeSettings(model=str(save_tiny_model(tmp_path / "model")), listen=listen, out=tmp_path / "out")


def federation(
    monkeypatch: pytest.MonkeyPatch,
    propose: Callable[[threading.Event], None],
    agreement: Callable[[threading.Event], Any] = lambda closed: SimpleNamespace(labels=["a", "b"]),
    reports: list[ReportRequest] | None = None,
) -> threading.Event:
    """Puts one in place of the client, which adds to `reports`; set once that is closed."""
    closed = threading.Event()
    told = [] if reports is None else reports
    client = SimpleNamespace(
        federation="this one",
        join=lambda request: None,
        agreement=lambda wait_s: agreement(closed),
        until_wanted=lambda agreed: None,
        report=told.append,
        propose=lambda header, state: propose(closed),
        until_closed=lambda: closed.wait(15),
        close=closed.set,
        traffic=Traffic(),
    )
    monkeypatch.setattr(daemon, "FederationClient", lambda *arguments, **named: client)
    return closed


def test_a_proposal_that_is_refused_ends_the_edge_and_its_server(
    settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def propose(closed: threading.Event) -> None:
        raise RefusedError("the proposal does not fit")

    stopped: list[Any] = []
    stop = daemon.stop
    monkeypatch.setattr(daemon, "stop", lambda server, grace_s: stopped.append(server) or stop(server, grace_s))
    reports: list[ReportRequest] = []
    closed = federation(monkeypatch, propose, reports=reports)
    with pytest.raises(RefusedError, match="the proposal does not fit"):
        daemon.run(settings)
    assert reports[-1].activity == "stopped by error SFL-600"
    assert closed.is_set()
    assert len(stopped) == 1
    check_listen(settings.listen)  # which is free again
    assert events(tmp_path / "out", "end")


def test_a_signal_ends_an_edge_whose_proposal_never_arrives(settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []

    def propose(closed: threading.Event) -> None:
        told.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)
        assert closed.wait(30)

    federation(monkeypatch, propose)
    daemon.run(settings)
    assert time.monotonic() - told[0] < 5


def test_an_edge_that_is_told_to_stop_before_the_agreement_ends_in_order(
    settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def agreement(closed: threading.Event) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        assert closed.wait(30)
        raise UnreachableError("the connection was closed")

    federation(monkeypatch, lambda closed: None, agreement)
    with caplog.at_level(logging.INFO, "sfl"):
        daemon.run(settings)
    assert "was told to stop before all members had agreed" in caplog.text
    check_listen(settings.listen)


async def _told(federation: Any, *arguments: Any) -> None:
    """In the place of proposing version 0: SIGTERM, while all threads of the loop's are taken until the client is closed."""
    for _ in range(40):
        asyncio.get_running_loop().run_in_executor(None, federation.until_closed)
    os.kill(os.getpid(), signal.SIGTERM)
    await asyncio.Event().wait()


def test_an_edge_whose_fetches_are_all_tried_again_stops_at_once_and_says_so(
    settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[ReportRequest] = []
    federation(monkeypatch, lambda closed: None, reports=reports)
    monkeypatch.setattr(daemon, "keep_version_0", _told)
    began = time.monotonic()
    daemon.run(settings)
    assert time.monotonic() - began < 6
    assert reports[-1].activity == "stopped"


def test_a_step_of_the_shutdown_that_fails_skips_no_other(
    settings: EdgeSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reports: list[ReportRequest] = []
    closed = federation(monkeypatch, lambda closed: None, reports=reports)
    monkeypatch.setattr(daemon, "keep_version_0", _told)

    async def stop(server: Any, grace_s: float) -> None:
        await server.stop(0)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(daemon, "stop", stop)
    with pytest.raises(RuntimeError):
        daemon.run(settings)
    assert closed.is_set()
    assert reports[-1].activity == "stopped by an error"
    assert events(tmp_path / "out", "end")
