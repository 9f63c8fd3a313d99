"""The federation over real gRPC, with the client that devices and edge servers use."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from sfl.adapters import peft_format
from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import HEAD, AdapterKey, AdapterState, device_half, edge_half, total, trained_part
from sfl.errors import RefusedError, UnknownMemberError, WireError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.messages import half_from_wire, member_from_wire
from sfl.fed_server.pool import Half
from sfl.fed_server.service import FederationService
from sfl.telemetry import MetricsWriter
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationStub, add_FederationServicer_to_server
from sfl.wire.adapters import lora_to_wire, to_tensors
from sfl.wire.channel import serve
from sfl.wire.channel import stop as stop_server
from sfl.wire.federation import FederationClient
from sfl.wire.frames import Traffic, frames
from tests.fed_server.made import LAYERS, LORA, adapter, federation, same

PROPOSAL = pb.ProposalHeader(edge="edge", blocks="model.layers", head=["score"], num_layers=LAYERS)


def join_request(name: str, role: Any = pb.DEVICE, **changes: Any) -> pb.JoinRequest:
    """A member that fits `tests.fed_server.made`."""
    request = pb.JoinRequest(name=name, role=role, task="classification", base_model="base", model_fingerprint="abc", cut=1)
    request.lora.CopyFrom(lora_to_wire(LORA))
    if role == pb.DEVICE:
        request.MergeFrom(pb.JoinRequest(examples=10, columns=["proto"], max_length=32))
        request.labels.extend(changes.pop("labels", ["benign", "scan"]))
    for field, value in changes.items():
        setattr(request, field, value)
    return request


def update(name: str, half: Any, version: int = 0, submission: str = "1") -> pb.UpdateHeader:
    return pb.UpdateHeader(submission=submission, device=name, half=half, version=version, examples=8, steps=1)


def small(state: AdapterState) -> AdapterState:
    """Of rank 1."""
    return {key: value[trained_part(key, 1)] for key, value in state.items()}


@contextmanager
def serving(fed: Federation, address: str = "127.0.0.1:0", heartbeat_s: float = 10.0) -> Iterator[tuple[str, FederationService]]:
    """The service on a loop in a thread of its own; gives its address."""
    loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[tuple[str, FederationService]] = []

    async def work() -> None:
        service = FederationService(fed, heartbeat_s)
        server, bound = serve(address)
        add_FederationServicer_to_server(service, server)
        await server.start()
        found.append((bound, service))
        ready.set()
        await stop.wait()
        service.end_watches()
        await stop_server(server, 1.0)

    thread = threading.Thread(target=loop.run_until_complete, args=(work(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield found[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()


@contextmanager
def clients(address: str, *names: str) -> Iterator[list[FederationClient]]:
    made = [FederationClient(address, name, wait_s=10, give_up_s=10) for name in names]
    try:
        yield made
    finally:
        for client in made:
            client.close()


def until(true: Callable[[], bool], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


def test_a_whole_federation_over_grpc(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2, strategy={"quorum": 1.0})
    with serving(fed) as (address, service), clients(address, "edge", "a", "b") as (edge, a, b):
        edge.join(join_request("edge", pb.EDGE))
        a.join(join_request("a", labels=["scan"]))
        b.join(join_request("b", labels=["benign"], cut=2))
        for client in (edge, a, b):
            agreement = client.agreement(10)
            assert list(agreement.labels) == ["benign", "scan"] and agreement.policy.triggered.beta == 2.0
        assert edge.propose(PROPOSAL, adapter(0)) is True
        assert a.version(0, 10) == 0
        assert same(a.fetch(0, 0, 1), device_half(adapter(0), 1))
        assert same(edge.fetch(0, 1), edge_half(adapter(0), 1))
        for client, name, cut, delta in ((a, "a", 1, adapter(1)), (b, "b", 2, adapter(2))):
            client.submit(update(name, pb.DEVICE), device_half(delta, cut))
            edge.submit(update(name, pb.EDGE), edge_half(delta, cut))
            edge.submit(update(name, pb.EDGE), edge_half(delta, cut))
        assert edge.version(1, 10) == a.version(1, 10) == b.version(1, 10) == 1
        result = b.fetch(1)
        for key, value in result.items():
            expected = adapter(0)[key] + 0.5 * adapter(1)[key] + 0.5 * adapter(2)[key]
            np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        a.leave()
        b.leave()
        until(lambda: edge.finished and a.finished and b.finished)
        sent = edge.traffic.sent + a.traffic.sent + b.traffic.sent
        until(lambda: service.traffic.received == sent)
        assert service.traffic.sent == edge.traffic.received + a.traffic.received + b.traffic.received > 0
    state, layout = peft_format.read(tmp_path / "v1")
    assert same(state, result) and layout.labels == ("benign", "scan") and layout.columns == ("proto",)


def test_an_edge_servers_half_of_a_device_that_nobody_knows_is_not_tried_on(tmp_path: Path) -> None:
    with serving(federation(tmp_path, 1)) as (address, _), clients(address, "edge") as (edge,):
        edge.join(join_request("edge", pb.EDGE))
        begun = time.monotonic()
        with pytest.raises(UnknownMemberError, match="'a' has not joined"):
            edge.submit(update("a", pb.EDGE), edge_half(adapter(1), 1))
        assert time.monotonic() - begun < 5


def test_an_adapter_of_many_chunks_arrives_whole(tmp_path: Path) -> None:
    big: AdapterState = {AdapterKey(layer, "q", "A"): np.full((2, 200_000), layer, "f4") for layer in range(LAYERS)}
    big |= {AdapterKey(layer, "q", "B"): np.zeros((5, 2), "f4") for layer in range(LAYERS)}
    big[AdapterKey(HEAD, "score", "weight")] = np.ones((2, 5), "f4")
    with serving(federation(tmp_path, 1)) as (address, _), clients(address, "edge", "a") as (edge, a):
        edge.join(join_request("edge", pb.EDGE))
        a.join(join_request("a"))
        edge.agreement(10)
        assert edge.propose(PROPOSAL, big)
        assert same(a.fetch(0), big)


def test_every_watcher_is_told_of_a_single_class(tmp_path: Path) -> None:
    with serving(federation(tmp_path, 1)) as (address, _), clients(address, "edge", "a") as (edge, a):
        edge.join(join_request("edge", pb.EDGE))
        a.join(join_request("a", labels=["benign"]))
        for client in (edge, a):
            with pytest.raises(RefusedError, match="only one class, 'benign'"):
                client.agreement(10)


def test_ranks_travel_and_each_device_is_told_its_own_pace(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2, strategy={"name": "gsfs", "min_steps": 10, "pace": 1.0})
    with serving(fed) as (address, _), clients(address, "edge", "a", "b") as (edge, a, b):
        edge.join(join_request("edge", pb.EDGE))
        a.join(join_request("a", rank=1))
        with pytest.raises(RefusedError, match="rank 3 is above the 2"):
            b.join(join_request("b", rank=3))
        b.join(join_request("b", examples=30))
        assert a.agreement(10).policy.triggered.min_steps == 20  # it has 10 examples, the mean is 20
        assert b.agreement(10).policy.triggered.min_steps == round(10 / 1.5)
        edge.propose(PROPOSAL, adapter(0))
        small = a.fetch(0, 0, 1, rank=1)
        assert small[AdapterKey(0, "q", "A")].shape == (1, 3) and small[AdapterKey(0, "q", "B")].shape == (5, 1)
        assert edge.fetch(0, 1, rank=1)[AdapterKey(1, "q", "A")].shape == (1, 3)
        assert same(b.fetch(0), adapter(0))


def test_a_device_that_trains_already_is_told_its_pace_when_the_others_have_come(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2, labels=("benign", "scan"), strategy={"name": "gsfs", "min_steps": 10, "pace": 1.0})
    with serving(fed) as (address, _), clients(address, "a", "b") as (a, b):
        assert a.policy is None
        a.join(join_request("a"))
        assert a.agreement(10).policy.triggered.min_steps == 10
        b.join(join_request("b", examples=30))
        until(lambda: a.policy is not None and a.policy.triggered.min_steps == 20)
        assert b.agreement(10).policy.triggered.min_steps == round(10 / 1.5)


def test_a_device_that_asks_for_the_newest_version_gets_it_and_for_a_removed_one_hears_so(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1, keep_versions=1)
    with serving(fed) as (address, _), clients(address, "edge", "a") as (edge, a):
        edge.join(join_request("edge", pb.EDGE))
        a.join(join_request("a", rank=1))
        edge.agreement(10)
        with pytest.raises(RefusedError, match="there is no version 0: none is published yet"):
            a.fetch_newest(1)
        edge.propose(PROPOSAL, adapter(0))
        for version in range(3):
            found, state = a.fetch_newest(1)
            assert found == version and same(state, a.fetch(version, 0, 1)) and state[AdapterKey(0, "q", "A")].shape == (1, 3)
            for client, role, part in ((edge, pb.EDGE, edge_half), (a, pb.DEVICE, device_half)):
                client.submit(update("a", role, version, str(version)), part(small(adapter(1)), 1))
        with pytest.raises(RefusedError, match="version 1 has been removed, and 3 is the newest"):
            a.fetch(1)
        assert a.fetch_newest(1)[0] == 3


MANY = ["x"] * 1001


@pytest.mark.parametrize(
    "changes",
    [{"name": "n" * 101}, {"name": "\x1b[2J"}, {"edge": "e" * 101}, {"base_model": "b" * 1001}, {"labels": MANY}]
    + [{field: MANY} for field in ("columns", "label_counts")],
)
def test_who_says_too_much_of_itself_does_not_join(tmp_path: Path, changes: dict[str, Any]) -> None:
    request = join_request("a")
    for field, value in changes.items():
        if isinstance(value, list):
            request.ClearField(field)
            getattr(request, field).extend(value if field != "label_counts" else range(len(value)))
        else:
            setattr(request, field, value)
    with pytest.raises(WireError):
        member_from_wire(request)
    member_from_wire(join_request("n" * 100, labels=["l" * 1000] * 1000))


@pytest.mark.parametrize("changes", [{"submission": "s" * 201}, {"submission": "s\n1"}, {"device": "d" * 101}])
def test_an_id_that_nobody_has_is_refused(changes: dict[str, str]) -> None:
    header = update("a", pb.DEVICE)
    header.MergeFrom(pb.UpdateHeader(**changes))
    with pytest.raises(WireError):
        half_from_wire(header)
    half_from_wire(update("d" * 100, pb.DEVICE, submission="d" * 100 + "-01234567/123456789"))


@pytest.mark.parametrize("error", [AdapterWriteError("no space left"), OSError(24, "Too many open files")])
def test_what_the_machine_refuses_makes_the_sender_try_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    fed = federation(tmp_path, 1)
    tries: list[int] = []
    take = fed.submit

    def submit(*arguments: Any) -> None:
        tries.append(1)
        if len(tries) == 1:
            raise error
        take(*arguments)

    monkeypatch.setattr(fed, "submit", submit)
    with serving(fed) as (address, _), clients(address, "edge", "a") as (edge, a):
        a.join(join_request("a"))
        edge.join(join_request("edge", pb.EDGE))
        edge.agreement(10)
        edge.propose(PROPOSAL, adapter(0))
        a.submit(update("a", pb.DEVICE), device_half(adapter(1), 1))
        assert len(tries) == 2


def test_each_upload_says_how_many_of_its_own_tries_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = federation(tmp_path / "adapters", 2, metrics=metrics, strategy={"quorum": 1.0, "reach": True})
    failing = [True]
    take = fed.submit

    def submit(half: Half, state: AdapterState) -> None:
        if half.device == "b" and half.half == "device" and failing:
            failing.pop()
            raise AdapterWriteError("not now")
        take(half, state)

    monkeypatch.setattr(fed, "submit", submit)
    with serving(fed) as (address, _), clients(address, "edge", "a", "b") as (edge, a, b):
        for client, name in ((a, "a"), (b, "b")):
            client.join(join_request(name))
        edge.join(join_request("edge", pb.EDGE))
        edge.agreement(10)
        edge.propose(PROPOSAL, adapter(0))

        def upload(client: FederationClient, name: str, submission: str, version: int) -> None:
            edge.submit(update(name, pb.EDGE, version, submission), edge_half(adapter(1), 1))
            client.submit(update(name, pb.DEVICE, version, submission), device_half(adapter(1), 1))

        upload(a, "a", "1", 0)
        upload(b, "b", "1", 0)
        assert fed.version == 1
        upload(a, "a", "2", 1)
        assert fed.version == 2, "b's last upload had to be sent again, so the quorum does not wait for b"
        upload(b, "b", "2", 1)
        assert fed.version == 2
        upload(a, "a", "3", 2)
        assert fed.version == 3
        upload(a, "a", "4", 3)
        assert fed.version == 3, "b's last upload went through at once"
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    failures = [(event["device"], event["failures"]) for event in events if event["event"] == "upload"]
    assert failures == [("a", 0), ("b", 1), ("a", 0), ("b", 0), ("a", 0), ("a", 0)]


def test_what_is_refused_on_arrival_is_counted_with_its_device(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = federation(tmp_path / "adapters", 1, metrics=metrics)
    with serving(fed) as (address, _), clients(address, "edge", "a") as (edge, a):
        a.join(join_request("a"))
        edge.join(join_request("edge", pb.EDGE))
        edge.agreement(10)
        edge.propose(PROPOSAL, adapter(0))
        poisoned = device_half(adapter(1), 1)
        poisoned[AdapterKey(0, "q", "A")][0, 0] = np.nan
        for state, reason in ((poisoned, "not finite"), ({}, "0/q/A is missing")):
            with pytest.raises(RefusedError, match=reason):
                a.submit(update("a", pb.DEVICE), state)
        whole = pb.AdapterMessage(update=update("a", pb.DEVICE))
        parts = list(frames(whole, to_tensors(device_half(adapter(1), 1)), Traffic()))
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError, match="ended before the last byte"):
            FederationStub(channel).Submit(iter(parts[:1]), timeout=10)
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    refused = [(event["device"], event["reason"]) for event in events if event["event"] == "refused"]
    assert [device for device, _ in refused] == ["a", "a", None] and fed.refused == 3
    assert all(word in reason for word, (_, reason) in zip(("not finite", "missing", "ended before"), refused))


def test_refusals_carry_the_reason_and_harm_nobody_else(tmp_path: Path) -> None:
    with serving(federation(tmp_path, 1)) as (address, _), clients(address, "edge", "a", "b") as (edge, a, b):
        a.join(join_request("a"))
        with pytest.raises(RefusedError, match="fingerprint other against abc"):
            b.join(join_request("b", model_fingerprint="other"))
        with pytest.raises(RefusedError, match="role 0 is unknown"):
            b.join(join_request("b", 0))
        edge.join(join_request("edge", pb.EDGE))
        edge.agreement(10)
        with pytest.raises(RefusedError, match="3/q/A is missing"):
            edge.propose(PROPOSAL, {key: value for key, value in adapter(0).items() if key.layer != 3})
        assert edge.propose(PROPOSAL, adapter(0))
        poisoned = device_half(adapter(1), 1)
        poisoned[AdapterKey(0, "q", "A")][0, 0] = np.nan
        with pytest.raises(RefusedError, match="not finite"):
            a.submit(update("a", pb.DEVICE), poisoned)
        with pytest.raises(RefusedError, match="no version 7"):
            a.fetch(7)
        a.submit(update("a", pb.DEVICE), device_half(adapter(1), 1))


def test_broken_streams_are_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    with serving(federation(tmp_path, 1)) as (address, _), clients(address, "edge", "a") as (edge, a):
        a.join(join_request("a"))
        edge.join(join_request("edge", pb.EDGE))
        edge.agreement(10)
        edge.propose(PROPOSAL, adapter(0))
        whole = pb.AdapterMessage(update=update("a", pb.DEVICE))
        parts = list(frames(whole, to_tensors(device_half(adapter(1), 1)), Traffic()))
        huge = pb.AdapterMessage(update=update("a", pb.DEVICE))
        huge.tensors.add(name="0/q/A", dtype=1, codec=1, shape=[2**28], byte_length=2**30)
        with grpc.insecure_channel(address) as channel:
            stub = FederationStub(channel)
            for stream, reason in (
                (parts[:1], "ended before the last byte"),
                (parts[1:], "more bytes"),
                ([], "ended before"),
                ([huge], "more than the"),
                ([pb.AdapterMessage(proposal=PROPOSAL)], "expected a message of kind 'update'"),
            ):
                with pytest.raises(grpc.RpcError) as caught:
                    stub.Submit(iter(stream), timeout=10)
                assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT and reason in str(caught.value.details())
        a.submit(update("a", pb.DEVICE), device_half(adapter(1), 1))


def test_a_watch_starts_with_the_state_beats_and_ends_with_its_caller(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2, time.monotonic, away_after_s=0.001)
    with serving(fed, heartbeat_s=0.05) as (address, _), grpc.insecure_channel(address) as channel:
        stub = FederationStub(channel)
        with pytest.raises(grpc.RpcError, match="has not joined"):
            next(stub.Watch(pb.WatchRequest(name="a")))
        stub.Join(join_request("a"))
        watch = stub.Watch(pb.WatchRequest(name="a"), timeout=10)
        assert next(watch).waiting == pb.Waiting(joined=1, expected=2)
        assert next(watch).WhichOneof("body") == next(watch).WhichOneof("body") == "heartbeat"
        assert fed._roster.present_devices() == {"a": 10}
        watch.cancel()
        until(lambda: not fed._roster.present_devices())


def test_clients_come_back_to_a_server_that_was_started_anew(tmp_path: Path) -> None:
    with serving(federation(tmp_path, 1)) as (address, _):
        made = [FederationClient(address, name, wait_s=10, give_up_s=30) for name in ("edge", "a")]
        edge, a = made
        edge.join(join_request("edge", pb.EDGE))
        a.join(join_request("a"))
        edge.agreement(10)
        edge.propose(PROPOSAL, adapter(0))
    try:
        with serving(federation(tmp_path, 1), address):
            a.submit(update("a", pb.DEVICE), device_half(adapter(1), 1))
            edge.submit(update("a", pb.EDGE), edge_half(adapter(1), 1))
            assert a.version(1, 20) == 1
            assert same(a.fetch(1), total(adapter(0), adapter(1)))
    finally:
        for client in made:
            client.close()


def test_the_daemon_serves_without_torch_and_ends_on_sigterm(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = (
        "import sys; from sfl.settings import FedSettings; from sfl.fed_server.daemon import run;"
        "from sfl.telemetry import configure_logging; configure_logging();"
        f"run(FedSettings(devices=1, listen='127.0.0.1:{port}', out={str(tmp_path)!r}));"
        "print(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            with clients(f"127.0.0.1:{port}", "a") as (a,):
                a.join(join_request("a"))
                assert a.agreement(10).max_length == 32
            process.send_signal(signal.SIGTERM)
            output, errors = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 0, errors
    assert output.strip() == "[]"
    assert f"federation server fed listens on 127.0.0.1:{port}" in errors
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["join", "end"]
    assert events[-1]["version"] is None and events[-1]["peak_rss_mb"] > 1
