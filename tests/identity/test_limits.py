"""What one node may take of a server: more is refused by name, costs the others nothing, and nothing waits for ever."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest

from sfl.adapters.state import device_half
from sfl.connection_settings import LimitSettings
from sfl.errors import BusyError, LimitError, RefusedError, UnreachableError
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationStub
from sfl.v1.split_pb2 import DeviceMessage
from sfl.v1.split_pb2_grpc import SplitTrainingStub
from sfl.wire.adapters import to_tensors
from sfl.wire.channel import retry
from sfl.wire.frames import Traffic, frames
from sfl.wire.split import batch_to_wire, open_to_wire
from tests.fed_server.made import adapter
from tests.fed_server.test_service import PROPOSAL, join_request, update
from tests.identity.made import dialled, refused
from tests.identity.services import Requests, edge_server, federation_server, linked

TRAIN, SUBMIT, JOIN = "/sfl.v1.SplitTraining/Train", "/sfl.v1.Federation/Submit", "/sfl.v1.Federation/Join"


def caller(address: str) -> grpc.Channel:
    """A connection of its own, as that of another process: without TLS callers are told apart by it."""
    return grpc.insecure_channel(address, options=(("grpc.use_local_subchannel_pool", 1),))


def submission(name: str, number: int = 1) -> list[Any]:
    """The frames of the device's half of an update."""
    message = pb.AdapterMessage(update=update(name, pb.DEVICE, submission=str(number)))
    return list(frames(message, to_tensors(device_half(adapter(1), 1)), Traffic()))


SIZE = sum(tensor.byte_length for tensor in submission("a")[0].tensors)


def test_open_calls_are_counted_by_caller(tmp_path: Path) -> None:
    with (
        federation_server(tmp_path, None, LimitSettings(streams=2)) as (address, fed, _),
        caller(address) as greedy,
        caller(address) as modest,
    ):
        stub = FederationStub(greedy)
        stub.Join(join_request("a"), timeout=5)
        watches = [stub.Watch(pb.WatchRequest(name="a")) for _ in range(2)]
        for watch in watches:
            next(watch)
        status, why = refused(lambda: next(stub.Watch(pb.WatchRequest(name="a"))))
        assert status == "UNAVAILABLE" and "has 2 calls open, as many as limits.streams allows" in why
        FederationStub(modest).Join(join_request("b"), timeout=5)
        assert fed.joined == 2
        watches[0].cancel()
        deadline = time.monotonic() + 5
        while True:  # the server hears of it in its own time
            again = stub.Watch(pb.WatchRequest(name="a"))
            try:
                next(again)
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline


@pytest.mark.parametrize("method", [TRAIN, SUBMIT, JOIN])
def test_a_call_that_says_nothing_is_ended(method: str, tmp_path: Path) -> None:
    serving = edge_server if method == TRAIN else federation_server
    with serving(tmp_path, None, LimitSettings(opening_s=0.3)) as (address, *_), dialled(address, None) as channel:
        requests = Requests()
        started = time.monotonic()
        status, why = refused(lambda: list(channel.stream_stream(method)(requests, timeout=10)))
        requests.close()
        assert status == "DEADLINE_EXCEEDED" and "nothing came in the first 0.3 s of the call (limits.opening_s)" in why
        assert 0.2 < time.monotonic() - started < 5


def test_a_message_that_stops_half_way_is_given_up(tmp_path: Path) -> None:
    with edge_server(tmp_path, None, LimitSettings(stalled_s=0.3)) as (address, halves, _), dialled(address, None) as channel:
        opening = DeviceMessage(open=open_to_wire(halves.request()))
        head, *_ = frames(DeviceMessage(step={"step": 1}), batch_to_wire(halves.batch()), Traffic())  # type: ignore[arg-type]
        requests = Requests(opening)
        replies = SplitTrainingStub(channel).Train(requests, timeout=20)
        assert next(replies).WhichOneof("body") == "opened"
        time.sleep(0.6)  # between two requests a device takes the time it needs
        requests.put(head)
        status, why = refused(lambda: next(replies))
        requests.close()
        assert status == "DEADLINE_EXCEEDED" and "a message stopped half-way for 0.3 s (limits.stalled_s)" in why
        link = linked(address, halves.request())
        assert link.step(1, 0, halves.batch()).step == 1  # the session is as it was
        link.hang_up()


@pytest.mark.parametrize("method", [TRAIN, SUBMIT, JOIN])
def test_what_cannot_be_read_costs_its_sender_the_call_and_no_traceback(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serving = edge_server if method == TRAIN else federation_server
    dice = random.Random(1)
    with serving(tmp_path, None) as (address, *_), dialled(address, None) as channel:
        for garbage in (b"\xff\xff\xff", b"\x0a\xff", *(dice.randbytes(dice.randrange(1, 200)) for _ in range(20))):
            call = channel.stream_stream(method)(iter([garbage]), timeout=10)
            status, _ = refused(lambda call=call: list(call) and None)
            assert status in ("INVALID_ARGUMENT", "FAILED_PRECONDITION")
    assert "Traceback" not in caplog.text


def test_unfinished_requests_wait_for_each_other_and_not_for_other_callers(tmp_path: Path) -> None:
    limits = LimitSettings(in_flight_mb=1.5 * SIZE / 1e6, request_mb=1e-5, adapter_mb=1e-5, stalled_s=20)
    with (
        federation_server(tmp_path, None, limits) as (address, fed, _),
        caller(address) as greedy,
        caller(address) as modest,
    ):
        for channel, name in ((greedy, "a"), (modest, "b")):
            FederationStub(channel).Join(join_request(name), timeout=5)
        head, *rest = submission("a")
        held = Requests(head)
        first = FederationStub(greedy).Submit.future(held, timeout=20)
        time.sleep(0.3)
        second = FederationStub(greedy).Submit.future(iter(submission("a", 2)), timeout=20)
        third = FederationStub(modest).Submit.future(iter(submission("b", 3)), timeout=20)
        answered = "submitted an update of version 0, but the newest is none"  # both were read whole
        assert answered in third.exception().details()
        time.sleep(0.3)
        assert not second.done()
        for frame in rest:
            held.put(frame)
        held.close()
        assert answered in first.exception().details() and answered in second.exception().details()
        assert fed.refused == 3


def test_a_request_above_all_limits_is_refused_by_name(tmp_path: Path) -> None:
    limits = LimitSettings(in_flight_mb=0.5 * SIZE / 1e6, request_mb=1e-5, adapter_mb=1e-5)
    with federation_server(tmp_path, None, limits) as (address, *_), dialled(address, None) as channel:
        status, why = refused(lambda: FederationStub(channel).Submit(iter(submission("a")), timeout=5))
        assert status == "RESOURCE_EXHAUSTED"
        assert f"announces a request of {SIZE} bytes, above limits.in_flight_mb ({SIZE // 2} bytes)" in why


def test_requests_that_never_end_do_not_hold_up_their_sender_for_ever(tmp_path: Path) -> None:
    limits = LimitSettings(in_flight_mb=1.5 * SIZE / 1e6, request_mb=1e-5, adapter_mb=1e-5, stalled_s=0.5)
    with federation_server(tmp_path, None, limits) as (address, *_), dialled(address, None) as channel:
        held = [Requests(submission("a", number)[0]) for number in (1, 2)]
        calls = [FederationStub(channel).Submit.future(each, timeout=20) for each in held]
        codes = {call.exception().code().name for call in calls}
        assert codes <= {"DEADLINE_EXCEEDED", "UNAVAILABLE"}
        for each in held:
            each.close()


def test_one_session_too_many_waits_until_another_ends_and_the_others_go_on(tmp_path: Path) -> None:
    with edge_server(tmp_path, None, LimitSettings(sessions=1)) as (address, halves, _):
        link = linked(address, halves.request("a"))
        link.step(1, 0, halves.batch(1))
        with pytest.raises(
            UnreachableError, match=r"edge-1 has sessions with 1 devices, as many as limits.sessions allows.* b to.*; gave up"
        ) as no:
            linked(address, halves.request("b"), give_up_s=0.3)
        assert no.value.number == BusyError.number
        assert link.step(2, 0, halves.batch(2)).step == 2
        session = halves.engine.resume(halves.request("a"))
        assert session is not None
        threading.Timer(0.3, halves.engine.close, [session]).start()
        linked(address, halves.request("b")).close()
        link.hang_up()


def test_a_call_too_many_is_tried_again_until_there_is_room(tmp_path: Path) -> None:
    with federation_server(tmp_path, None, LimitSettings(streams=1)) as (address, fed, _), caller(address) as channel:
        FederationStub(channel).Join(join_request("a"), timeout=5)
        watch = FederationStub(channel).Watch(pb.WatchRequest(name="a"))
        next(watch)
        threading.Timer(0.3, watch.cancel).start()
        retry(lambda: FederationStub(channel).Leave(pb.LeaveRequest(name="a"), timeout=5), "the federation server", 5)
        assert [each.state for each in fed.presences()] == ["left"]


def test_a_batch_above_the_limit_costs_its_sender_the_stream(tmp_path: Path) -> None:
    with edge_server(tmp_path, None, LimitSettings(request_mb=1e-4)) as (address, halves, _):
        link = linked(address, halves.request("a"))
        with pytest.raises(RefusedError, match=r"above limits.request_mb \(100 bytes\)") as no:
            link.step(1, 0, halves.batch(1))
        assert no.value.number == LimitError.number
        link.hang_up()


def test_an_adapter_above_the_limit_is_refused_by_name(tmp_path: Path) -> None:
    limits = LimitSettings(adapter_mb=1e-4)
    with federation_server(tmp_path, None, limits, devices=1) as (address, fed, _), dialled(address, None) as channel:
        for request in (join_request("edge", pb.EDGE), join_request("a")):
            FederationStub(channel).Join(request, timeout=5)
        fed.tick()
        message = pb.AdapterMessage(proposal=PROPOSAL)
        whole = list(frames(message, to_tensors(adapter(0)), Traffic()))
        status, why = refused(lambda: FederationStub(channel).Propose(iter(whole), timeout=5))
        assert status == "RESOURCE_EXHAUSTED" and "above limits.adapter_mb (100 bytes)" in why


def test_a_proposal_that_is_not_needed_is_answered_by_its_header(tmp_path: Path) -> None:
    with federation_server(tmp_path, None, devices=1) as (address, fed, _), dialled(address, None) as channel:
        stub = FederationStub(channel)
        for name in ("edge", "other"):
            stub.Join(join_request(name, pb.EDGE), timeout=5)
        stub.Join(join_request("a"), timeout=5)
        fed.tick()
        whole = list(frames(pb.AdapterMessage(proposal=PROPOSAL), to_tensors(adapter(0)), Traffic()))
        assert stub.Propose(iter(whole), timeout=5).accepted
        for edge, accepted in (("edge", True), ("other", False)):
            whole[0].proposal.edge = edge
            assert stub.Propose(Requests(whole[0]), timeout=5).accepted is accepted, "its tensors never come"


def test_hundreds_of_calls_leave_nothing_behind(tmp_path: Path) -> None:
    with federation_server(tmp_path, None) as (address, _, guard), dialled(address, None) as channel:
        stub = FederationStub(channel)
        for _ in range(150):
            stub.Join(join_request("a"), timeout=5)
            refused(lambda: stub.Submit(iter([pb.AdapterMessage()]), timeout=5))
        deadline = time.monotonic() + 5
        while guard._calls or guard._allowances:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert threading.active_count() < 50
