"""Mutated and random messages to every call of every service, in plaintext: no crash, no hang, no growth, and honest sessions
undisturbed."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

from sfl.adapters.state import device_half
from sfl.connection_settings import LimitSettings
from sfl.v1 import federation_pb2 as pb
from sfl.v1 import provision_pb2, split_pb2
from sfl.v1.federation_pb2_grpc import FederationStub
from sfl.v1.split_pb2 import DeviceMessage
from sfl.wire.adapters import to_tensors
from sfl.wire.frames import Traffic, frames
from sfl.wire.split import Standing, batch_to_wire, open_to_wire
from tests.edge_server.made import Halves
from tests.fed_server.made import LAYERS, adapter
from tests.fed_server.test_service import join_request, update
from tests.identity.services import edge_server, federation_server, linked

SHORT, LONG = 1_000, 100_000  # messages to each service
# What a server may say to nonsense. UNKNOWN, an exception of a handler, and INTERNAL are not among it.
SAID = {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "PERMISSION_DENIED", "NOT_FOUND"}
ENDLESS = ("/sfl.v1.Federation/Watch", "/grpc.health.v1.Health/Watch")  # calls that go on after their first answer
LIMITS = LimitSettings(opening_s=5, stalled_s=5, in_flight_mb=50, request_mb=20, adapter_mb=20)


class Fuzzer:
    """Sends streams of mutated messages and notes what it was told. `valid` has whole streams of good ones, by call."""

    def __init__(self, address: str, valid: dict[str, Sequence[Sequence[Any]]], seed: int) -> None:
        self.sent = 0
        self.told: dict[str, int] = {}
        self._channel = grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))
        self._valid = {
            method: [[m.SerializeToString() for m in stream] for stream in streams] for method, streams in valid.items()
        }
        self._dice = random.Random(seed)

    def attack(self) -> None:
        method = self._dice.choice(list(self._valid))
        messages = self._mutated(self._dice.choice(self._valid[method]))
        self.sent += len(messages)
        call = self._channel.stream_stream(method)(iter(messages), timeout=15)
        try:
            for number, _ in enumerate(call):
                if number == 200 or method in ENDLESS:  # heartbeats and files
                    call.cancel()
                    break
            status = "OK"
        except grpc.RpcError as error:
            status = error.code().name
            assert status in SAID, f"{method} answered {status}: {error.details()}; it was sent {messages!r:.2000}"
        self.told[status] = self.told.get(status, 0) + 1

    def close(self) -> None:
        self._channel.close()

    def _mutated(self, stream: Sequence[bytes]) -> list[bytes]:
        dice, messages = self._dice, list(stream)
        for _ in range(dice.randrange(1, 4)):
            at = max(dice.randrange(len(messages)) for _ in range(2))  # later ones meet a server that has begun
            kind = dice.randrange(6)
            if kind == 0:
                messages[at] = dice.randbytes(dice.randrange(300))
            elif kind == 1:
                messages[at] = messages[at][: dice.randrange(len(messages[at]) + 1)]
            elif kind == 2:
                messages.insert(at, dice.choice(messages))
            elif kind == 3 and len(messages) > 1:
                del messages[at]
            elif messages[at]:
                changed = bytearray(messages[at])
                for _ in range(dice.randrange(1, 4)):
                    place = dice.randrange(min(len(changed), 400))  # headers come first
                    changed[place] = dice.choice((0, 1, 0x7F, 0x80, 0xFF, dice.randrange(256)))
                messages[at] = bytes(changed)
        return messages


def edge_streams(halves: Halves) -> dict[str, Sequence[Sequence[Any]]]:
    def step(number: int) -> Iterator[Any]:
        batch = batch_to_wire(halves.batch(number))
        return frames(DeviceMessage(step=split_pb2.Step(step=number, checkpoint=number)), batch, Traffic())

    opening = DeviceMessage(open=open_to_wire(halves.request("attacker")))
    evaluation = frames(DeviceMessage(evaluate=split_pb2.Evaluate()), batch_to_wire(halves.batch()), Traffic())
    ends = [
        DeviceMessage(submit=split_pb2.SubmitHalf(submission="attacker/1")),
        DeviceMessage(adopt=split_pb2.Adopt(keep_progress=True)),
        DeviceMessage(close=split_pb2.Close()),
    ]
    half = provision_pb2.Half(source="c" * 64, cut=2, precision="int8")
    resumed = open_to_wire(halves.request("attacker"), Standing(resume=True, restored=True, checkpoints=(1, 2)))
    return {
        **health_streams("sfl.v1.Provisioning"),
        "/sfl.v1.SplitTraining/Train": [
            [opening],
            [opening, *step(1), *step(2)],
            [opening, *evaluation],
            [opening, *step(1), *ends],
            [DeviceMessage(open=resumed), *step(3)],
            [opening, *step(1), DeviceMessage(pause=split_pb2.Pause(checkpoint=1))],
        ],
        "/sfl.v1.Provisioning/Describe": [[provision_pb2.DescribeRequest(device="attacker")]],
        "/sfl.v1.Provisioning/Pack": [[provision_pb2.PackRequest(device="attacker", half=half)]],
        "/sfl.v1.Provisioning/Read": [[provision_pb2.ReadRequest(device="attacker", half=half, file="x", offset=1, length=5)]],
    }


def federation_streams() -> dict[str, Sequence[Sequence[Any]]]:
    join = join_request("attacker")
    proposal = pb.ProposalHeader(edge="edge", blocks="model.layers", head=["score"], num_layers=LAYERS)
    half = device_half(adapter(1), 1)
    service = "/sfl.v1.Federation/"
    return {
        **health_streams("sfl.v1.Federation"),
        service + "Watch": [[pb.WatchRequest(name="attacker")]],
        service + "Join": [[join], [join_request("edge", pb.EDGE)]],
        service + "Check": [[join]],
        service + "Propose": [list(frames(pb.AdapterMessage(proposal=proposal), to_tensors(adapter(0)), Traffic()))],
        service + "Submit": [
            list(frames(pb.AdapterMessage(update=update("attacker", pb.DEVICE)), to_tensors(half), Traffic())),
            list(frames(pb.AdapterMessage(update=update("honest", pb.EDGE)), to_tensors(half), Traffic())),
        ],
        service + "Fetch": [[pb.FetchRequest(name="attacker", version=0, last_layer=2)]],
        service + "Leave": [[pb.LeaveRequest(name="attacker")]],
        service + "Report": [[pb.ReportRequest(name="attacker", steps=5, loss=1.0)]],
        service + "Status": [[pb.StatusRequest()]],
    }


def health_streams(service: str) -> dict[str, Sequence[Sequence[Any]]]:
    asked = [[health_pb2.HealthCheckRequest(service=service)]]
    return {"/grpc.health.v1.Health/Check": asked, "/grpc.health.v1.Health/Watch": asked}


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def attacked(address: str, valid: dict[str, Sequence[Sequence[Any]]], messages: int, honest: Callable[[], None]) -> None:
    """Attack with so many messages, and let the honest ones have their turn twenty times."""
    fuzzer = Fuzzer(address, valid, seed=messages)
    figures: list[float] = []
    try:
        for part in range(20):
            while fuzzer.sent < messages * (part + 1) / 20:
                fuzzer.attack()
            honest()
            figures.append(resident_mb())
    finally:
        fuzzer.close()
    assert len(fuzzer.told) >= 3 and fuzzer.told["INVALID_ARGUMENT"] > 10
    print(f"{fuzzer.sent} messages, answered {fuzzer.told}; resident {figures[5]:.0f} MB, then {figures[-1]:.0f} MB")
    if messages >= LONG:
        assert figures[-1] < 1.1 * figures[5], figures


amounts = pytest.mark.parametrize("messages", [SHORT, pytest.param(LONG, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Or pytest would keep every refusal that is logged, and that would be the growth."""
    caplog.set_level(logging.CRITICAL, "sfl")


@amounts
def test_an_edge_server_bears_whatever_comes(messages: int, tmp_path: Path) -> None:
    alone = Halves()
    session = alone.engine.open(alone.request("honest"), alone.initial)
    with edge_server(tmp_path, None, LIMITS, kept=True) as (address, halves, guard):
        link = linked(address, halves.request("honest"))
        steps = iter(range(1, 100))

        def honest() -> None:
            number = next(steps)
            expected = alone.engine.step(session, number, 0, alone.batch(number)).loss
            assert link.step(number, 0, halves.batch(number)).loss == expected

        attacked(address, edge_streams(halves), messages, honest)
        link.hang_up()
        deadline = time.monotonic() + 10
        while guard._calls:
            assert time.monotonic() < deadline, "calls were left open"
            time.sleep(0.01)


@amounts
def test_a_federation_server_bears_whatever_comes(messages: int, tmp_path: Path) -> None:
    with federation_server(tmp_path, None, LIMITS, devices=50) as (address, fed, guard):
        channel = grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))

        def honest() -> None:
            FederationStub(channel).Join(join_request("honest"), timeout=5)

        honest()
        attacked(address, federation_streams(), messages, honest)
        channel.close()
        assert fed.failure is None
        deadline = time.monotonic() + 10
        while guard._calls:
            assert time.monotonic() < deadline, "calls were left open"
            time.sleep(0.01)
