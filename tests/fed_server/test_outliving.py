"""Members that outlive their federation server, over gRPC: they find the next one, or say why they cannot go on with it."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import device_half, edge_half
from sfl.edge_server import daemon as edge_daemon
from sfl.edge_server.daemon import keep_version_0
from sfl.errors import RefusedError, SflError, StateDiffersError, StateWriteError, UnreachableError, WaitedError
from sfl.fed_server import daemon, ledger
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationStub
from sfl.wire.adapters import to_tensors
from sfl.wire.federation import FederationClient
from sfl.wire.frames import Traffic, frames
from tests.fed_server.made import adapter, federation, no_more_files
from tests.fed_server.test_service import PROPOSAL, join_request, serving, until, update

ROOT = Path(__file__).parents[2]


@contextmanager
def server(out: Path, address: str = "127.0.0.1:0", devices: int = 1, **settings: Any) -> Iterator[tuple[Federation, str]]:
    chosen = FedSettings.model_validate({"devices": devices, **settings})
    fed = Federation(chosen, VersionStore(out / "adapters"), MetricsWriter(None), out=out)
    with serving(fed, address) as (bound, _):
        fed.tick()
        yield fed, bound
    fed.close()


@contextmanager
def members(address: str, *names: str, give_up_s: float = 20, **changes: Any) -> Iterator[list[FederationClient]]:
    """Clients that have joined; one called edge is an edge server."""
    made = [FederationClient(address, name, wait_s=10, give_up_s=give_up_s) for name in names]
    try:
        for client, name in zip(made, names, strict=True):
            client.join(join_request(name, pb.EDGE) if name == "edge" else join_request(name, **changes))
        yield made
    finally:
        for client in made:
            client.close()


@contextmanager
def proposing(edge: FederationClient) -> Iterator[list[SflError]]:
    """The edge server's own loop, in a thread; what that ended with."""
    agreed, ended = edge.agreement(10), list[SflError]()

    def work() -> None:
        try:
            asyncio.run(keep_version_0(edge, agreed, PROPOSAL, adapter(0)))
        except SflError as error:
            ended.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    yield ended
    edge.close()
    thread.join(5)
    assert not thread.is_alive()


def submit(device: FederationClient, edge: FederationClient, name: str, version: int, submission: str) -> None:
    device.submit(update(name, pb.DEVICE, version, submission), device_half(adapter(1), 1))
    edge.submit(update(name, pb.EDGE, version, submission), edge_half(adapter(1), 1))


def test_who_waits_for_version_0_says_what_is_missing(tmp_path: Path) -> None:
    with server(tmp_path, devices=2) as (_, address), members(address, "a") as (a,):
        with pytest.raises(WaitedError, match=r"waited 0.2 s for version 0 .1 of 2 devices have joined."):
            a.version(0, 0.2)
        with members(address, "b"):
            a.agreement(10)
            until(lambda: "version 0" in a._state)
            with pytest.raises(WaitedError, match=r"all have joined but an edge server, .*: start one with `sfl edge`"):
                a.version(0, 0.2)
            with members(address, "edge"):
                until(lambda: "is to come" in a._state)
                with pytest.raises(WaitedError, match=r"version 0 is to come from the edge server edge"):
                    a.version(0, 0.2)


def test_members_go_on_with_the_next_server_of_the_same_folder(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with server(tmp_path) as (_, address):
            edge, a = stack.enter_context(members(address, "edge", "a"))
            stack.enter_context(proposing(edge))
            assert a.version(0, 10) == 0
            a.submit(update("a", pb.DEVICE, 0, "s/1"), device_half(adapter(1), 1))
        joins: list[str] = []
        with server(tmp_path, address) as (again, _):
            again.join = lambda member: joins.append(member.name)  # type: ignore[method-assign]
            edge.submit(update("a", pb.EDGE, 0, "s/1"), edge_half(adapter(1), 1))
            a.submit(update("a", pb.DEVICE, 0, "s/1"), device_half(adapter(1), 1))
            assert a.version(1, 10) == edge.version(1, 10) == 1 and joins == []
            a.leave()
            until(lambda: a.finished)
    assert ledger.check(tmp_path) == ledger.Balance(accepted=1, counted=1)


def test_an_edge_server_proposes_again_to_a_server_that_has_lost_its_folder(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with server(tmp_path / "lost") as (_, address):
            edge, a = stack.enter_context(members(address, "edge", "a"))
            ended = stack.enter_context(proposing(edge))
            forgotten: list[str] = []
            edge.on_new_federation = lambda: forgotten.append(edge.federation)
            assert a.version(0, 10) == 0
            submit(a, edge, "a", 0, "s/1")
            assert edge.version(1, 10) == 1
        with server(tmp_path / "empty", address) as (again, _):
            until(lambda: forgotten == [again.id])
            b = stack.enter_context(members(address, "b"))[0]
            assert b.version(0, 10) == 0 and edge.version(0, 10) == 0 and ended == []
            submit(b, edge, "b", 0, "s/1")
            assert b.version(1, 10) == 1
            with pytest.raises(RefusedError, match=r"device 'a' .* has trained with versions that this federation server does"):
                a.submit(update("a", pb.DEVICE, 1, "s/2"), device_half(adapter(1), 1))
    assert ledger.check(tmp_path / "empty") == ledger.Balance(accepted=1, counted=1)


def test_version_0_is_proposed_until_there_is_room_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    room, publish = threading.Event(), VersionStore.publish

    def full(self: VersionStore, *arguments: Any) -> Any:
        if not room.is_set():
            raise AdapterWriteError("No space left on device")
        return publish(self, *arguments)

    monkeypatch.setattr(VersionStore, "publish", full)
    monkeypatch.setattr(edge_daemon, "_AGAIN_S", 0.1)
    with server(tmp_path) as (_, address), members(address, "edge", "a", give_up_s=0.3) as (edge, a), proposing(edge) as ended:
        until(lambda: "version 0 could not be proposed" in caplog.text)
        room.set()
        assert a.version(0, 5) == 0 and ended == []


def test_an_edge_server_ends_when_the_labels_are_others(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with server(tmp_path / "lost") as (_, address):
            edge, a = stack.enter_context(members(address, "edge", "a"))
            ended = stack.enter_context(proposing(edge))
            assert a.version(0, 10) == 0
        with server(tmp_path / "empty", address):
            stack.enter_context(members(address, "b", labels=["benign", "worm"]))
            until(lambda: bool(ended))
            assert isinstance(ended[0], StateDiffersError)
            assert "labels benign, worm, and edge was started with benign, scan: start it again" in str(ended[0])


def test_an_edge_server_never_gives_up_and_goes_on_with_the_next_run(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with server(tmp_path) as (fed, address):
            edge, a = stack.enter_context(members(address, "edge", "a", give_up_s=0.5))
            ended = stack.enter_context(proposing(edge))
            assert a.version(0, 10) == 0
            a.leave()
            until(lambda: edge.finished and a.finished and fed.finished)
            with pytest.raises(RefusedError, match=r"federation has finished"):
                stack.enter_context(members(address, "late"))
        time.sleep(1.0)  # longer than give_up_s
        with server(tmp_path, address) as (again, _):
            assert again.finished
            b = stack.enter_context(members(address, "b"))[0]
            assert b.version(0, 10) == 0
            until(lambda: again.edges() == ["edge"])
            submit(b, edge, "b", 0, "s/1")
            until(lambda: edge.newest == 1)
            assert not edge.finished and ended == []


def test_a_device_gives_up(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with server(tmp_path) as (_, address):
            (a,) = stack.enter_context(members(address, "a", give_up_s=0.5))
        with pytest.raises(UnreachableError, match=r"gave up after"):
            until(lambda: a.newest is not None)


def test_a_device_that_is_refused_when_it_comes_back_is_told_at_once(tmp_path: Path) -> None:
    with ExitStack() as stack:
        with server(tmp_path / "one", devices=2) as (_, address):
            (a,) = stack.enter_context(members(address, "a"))
        with server(tmp_path / "two", address) as (again, _):
            again.join = _refuse  # type: ignore[method-assign]
            with pytest.raises(RefusedError, match=r"not you"):
                until(lambda: a.newest is not None)


def _refuse(member: object) -> None:
    raise RefusedError("not you")


def test_what_cannot_be_kept_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries: list[str] = []
    take = ledger.Ledger.accepted

    def accepted(self: ledger.Ledger, submission: Any) -> None:
        tries.append(submission.submission)
        if len(tries) < 3:
            raise StateWriteError("no space left")
        take(self, submission)

    monkeypatch.setattr(ledger.Ledger, "accepted", accepted)
    with server(tmp_path) as (fed, address), members(address, "edge", "a") as (edge, a), proposing(edge):
        assert a.version(0, 10) == 0
        submit(a, edge, "a", 0, "s/1")
        assert a.version(1, 10) == 1 and tries == ["s/1"] * 3 and fed.refused == 0
    assert ledger.check(tmp_path) == ledger.Balance(accepted=1, counted=1)


def test_a_server_that_is_told_to_stop_finishes_what_is_under_way(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    script = (
        "from sfl.settings import FedSettings; from sfl.fed_server.daemon import run;"
        "from sfl.telemetry import configure_logging; configure_logging();"
        f"run(FedSettings(devices=1, listen={address!r}, out={str(tmp_path)!r}))"
    )
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            with members(address, "edge", "a") as (edge, a), proposing(edge):
                assert a.version(0, 10) == 0
                edge.submit(update("a", pb.EDGE, 0, "s/1"), edge_half(adapter(1), 1))
                message = pb.AdapterMessage(update=update("a", pb.DEVICE, 0, "s/1"))
                parts = list(frames(message, to_tensors(device_half(adapter(1), 1)), Traffic()))

                def slowly() -> Iterator[pb.AdapterMessage]:
                    yield parts[0]
                    time.sleep(0.3)
                    process.send_signal(signal.SIGTERM)
                    time.sleep(0.7)
                    yield from parts[1:]

                with grpc.insecure_channel(address) as channel:
                    FederationStub(channel).Submit(slowly(), timeout=20)  # is acknowledged
                    told = time.monotonic()
                    _, errors = process.communicate(timeout=20)
                assert time.monotonic() - told < 5, "nothing else was waited for"
        finally:
            process.kill()
    assert process.returncode == 0 and "Traceback" not in errors, errors
    assert ledger.check(tmp_path) == ledger.Balance(accepted=1, counted=1)


def test_a_tick_that_the_machine_refuses_does_not_end_the_server_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed = federation(tmp_path, 1)

    def starved() -> None:
        with no_more_files():
            (tmp_path / "any").touch()

    well, ticking = fed.tick, daemon._Ticking(fed)
    for said in (1, 2):
        fed.tick = starved  # type: ignore[method-assign]
        ticking.tick()
        ticking.tick()
        assert caplog.text.count("Too many open files") == said
        fed.tick = well  # type: ignore[method-assign]
        ticking.tick()
