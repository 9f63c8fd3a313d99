"""Split training over real gRPC: what devices may do, what they may not, and that no one pays for another's mistake."""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from sfl.adapters.state import edge_half, total
from sfl.device.edge_link import GrpcEdgeLink
from sfl.edge_server import service as service_module
from sfl.errors import RefusedError, SflError, UnreachableError, WireError
from sfl.telemetry import MetricsWriter
from sfl.v1 import split_pb2, tensor_pb2
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.v1.split_pb2_grpc import SplitTrainingStub
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.split import SessionRequest, StepTerms, TrainingRules, batch_to_wire, open_to_wire
from sfl.wire.tensors import RawTensor
from tests.edge_server.made import Halves, ServedEdge, at_rank, eventually, served
from tests.metrics import events

METHOD = "/sfl.v1.SplitTraining/Train"


@pytest.fixture
def edge() -> Iterator[ServedEdge]:
    with served(Halves()) as made:
        yield made


@contextlib.contextmanager
def linked(edge: ServedEdge, request: SessionRequest | None = None) -> Iterator[GrpcEdgeLink]:
    link = GrpcEdgeLink(edge.address, request or edge.halves.request(), 5, 5)
    try:
        link.begin()
        yield link
    finally:
        link.hang_up()


def undisturbed(halves: Halves, request: SessionRequest, steps: int) -> list[float]:
    """The losses of the engine alone; `halves` are the test's own."""
    session = halves.engine.open(request, halves.initial)
    return [halves.engine.step(session, number, 0, halves.batch(number)).loss for number in range(1, steps + 1)]


def stepped(edge: ServedEdge, link: GrpcEdgeLink, numbers: range, version: int = 0) -> list[float]:
    return [link.step(number, version, edge.halves.batch(number)).loss for number in numbers]


class Stranger:
    """A stream that says whatever it is told to."""

    def __init__(self, edge: ServedEdge) -> None:
        self._channel = grpc.insecure_channel(edge.address)
        self._stub = SplitTrainingStub(self._channel)
        self._edge = edge

    def say(self, *messages: DeviceMessage | tuple[DeviceMessage, list[RawTensor]], opened: bool = True) -> list[EdgeMessage]:
        """All whole answers; raises `grpc.RpcError` when the edge breaks off."""
        pairs: list[Any] = [message if isinstance(message, tuple) else (message, []) for message in messages]
        if opened:
            pairs.insert(0, (DeviceMessage(open=open_to_wire(self._edge.halves.request("stranger", cut=1))), []))
        stream = self._stub.Train(
            (frame for message, tensors in pairs for frame in frames(message, tensors, Traffic())), timeout=10
        )
        assembler: Assembler[EdgeMessage] = Assembler(Traffic())
        return [whole[0] for frame in stream if (whole := assembler.feed(frame)) is not None]

    def close(self) -> None:
        self._channel.close()


def test_losses_and_gradients_are_the_engines_own(edge: ServedEdge) -> None:
    halves = Halves()
    session = halves.engine.open(halves.request(), halves.initial)
    with linked(edge) as link:
        for number in range(1, 5):
            expected = halves.engine.step(session, number, 0, halves.batch(number))
            found = link.step(number, 0, halves.batch(number))
            assert found.loss == expected.loss
            assert found.layer_norms == expected.layer_norms
            assert torch.equal(found.gradient, expected.gradient)
        mine, theirs = halves.engine.evaluate(session, 0, halves.batch(9)), link.evaluate(0, halves.batch(9))
        assert (mine.loss, mine.count) == (theirs.loss, theirs.count)
        assert mine.logits is not None
        assert theirs.logits is not None
        assert torch.equal(mine.logits, theirs.logits)
        assert link.traffic.sent == edge.service.traffic.received
        assert link.traffic.received == edge.service.traffic.sent
        link.close()


def test_devices_of_other_ranks_get_and_send_factors_of_their_own() -> None:
    ranks = {"small": 1, "middle": 3, "whole": 0}
    halves = Halves(rank=4)
    requests = {name: halves.request(name, rank=rank, cut=1 + rank % 3) for name, rank in ranks.items()}
    with served(Halves(rank=4)) as edge, contextlib.ExitStack() as stack:
        links = {name: stack.enter_context(linked(edge, request)) for name, request in requests.items()}
        newer = edge.federation.publish(1)
        found: dict[str, list[float]] = {name: [] for name in ranks}
        for number in range(1, 4):
            for name, link in links.items():
                found[name].append(link.step(number, 0, halves.batch(number)).loss)
        for name, link in links.items():
            link.submit(f"{name}/1", 0)
            link.adopt(1, False)
            session = edge.halves.engine.resume(requests[name])
            assert session is not None
            adopted, expected = session.adapter.values(), edge_half(at_rank(newer, ranks[name]), requests[name].cut)
            assert all(np.array_equal(adopted[key], value) for key, value in expected.items())
            assert adopted.keys() == expected.keys()
            link.close()
        assert sorted(zip(edge.federation.fetches, map(str, edge.federation.ranks))) == [
            (version, str(rank)) for version in (0, 1) for rank in (0, 1, 3)
        ]
        sent = {header.device: progress for header, progress in edge.federation.submitted}
    for name, rank in ranks.items():
        session = halves.engine.open(requests[name], at_rank(halves.initial, rank))
        start = session.adapter.values()
        assert found[name] == [halves.engine.step(session, number, 0, halves.batch(number)).loss for number in range(1, 4)]
        learnt = {key: value - start[key] for key, value in session.adapter.values().items()}
        assert all(np.array_equal(sent[name][key], value) for key, value in learnt.items())
        assert {value.shape[0] for key, value in sent[name].items() if key.part == "A"} == {rank or 4}
    assert len({losses[-1] for losses in found.values()}) == 3


def test_rules_and_the_factor_on_the_rate_arrive() -> None:
    halves, rules = Halves(), TrainingRules(proximal=0.5, frozen_parts=("A",), fresh_optimizer=True)
    request = halves.request(rules=rules)
    session = halves.engine.open(request, halves.initial)
    with served(Halves()) as edge, linked(edge, request) as link:
        for number, terms in enumerate((StepTerms(), StepTerms(0.5), StepTerms()), start=1):
            expected = halves.engine.step(session, number, 0, halves.batch(number), terms)
            assert link.step(number, 0, halves.batch(number), terms).loss == expected.loss
        link.submit("device-1/1", 0)
        link.close()
    ((_, progress),) = edge.federation.submitted
    expected_progress = halves.engine.take_progress(session, "device-1/1", 0)
    assert progress.keys() == expected_progress.keys()
    assert all(np.array_equal(progress[key], value) for key, value in expected_progress.items())
    assert not any(key.part == "A" for key in progress)


def test_offsets_of_the_logits_arrive_with_their_step_and_must_be_one_of_each_class() -> None:
    halves = Halves(family="bert")
    session = halves.engine.open(halves.request(), halves.initial)
    with served(Halves(family="bert")) as edge, linked(edge, halves.request()) as link:
        for number, offsets in enumerate(((), (0.5, -3.0, 0.0), ()), start=1):
            expected = halves.engine.step(session, number, 0, halves.batch(number), StepTerms(1.0, offsets))
            assert link.step(number, 0, halves.batch(number), StepTerms(1.0, offsets)).loss == expected.loss
        with pytest.raises(WireError, match="2 offsets of the logits came"):
            halves.engine.step(session, 4, 0, halves.batch(4), StepTerms(1.0, (0.5, 0.5)))
        with pytest.raises(RefusedError, match="2 offsets of the logits came"):
            link.step(4, 0, halves.batch(4), StepTerms(1.0, (0.5, 0.5)))


@pytest.mark.parametrize("count", [2, 6])
def test_many_devices_at_once_are_as_if_alone(count: int) -> None:
    halves = Halves(dropout=0.2)
    requests = [halves.request(f"device-{i}", cut=1 + i % 3, seed=i) for i in range(count)]
    expected = [undisturbed(halves, request, 4) for request in requests]
    found: dict[int, list[float]] = {}
    with served(Halves(dropout=0.2)) as edge:

        def device(index: int) -> None:
            with linked(edge, requests[index]) as link:
                found[index] = stepped(edge, link, range(1, 5))
                link.close()

        threads = [threading.Thread(target=device, args=(index,)) for index in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert edge.service.steps == 4 * count
    assert [found[index] for index in range(count)] == expected


def test_megabytes_pass_with_default_limits() -> None:
    with served(Halves(hidden=256)) as edge, linked(edge) as link:
        batch = edge.halves.batch(size=64, tokens=100)
        assert batch.activation.nbytes > 6 * 2**20
        result = link.step(1, 0, batch)
        assert result.gradient.shape == batch.activation.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_fingerprint": "e" * 64}, "the edge server refused: the base models differ"),
        ({"task": "causal-lm"}, "trains for causal-lm, this edge for classification"),
        ({"cut": 1}, "cut 1 is below 2"),
        ({"cut": 4}, "cut 4 is not possible"),
        ({"lora": None}, "LoRA settings differ"),
        ({"version": 5}, "there is no version 5"),
        ({"device": ""}, "must have a name"),
    ],
)
def test_refusals_are_clear_and_at_once(changes: dict[str, Any], message: str) -> None:
    with served(Halves(lowest_cut=2)) as edge:
        if "lora" in changes:
            changes = {"lora": replace(edge.halves.lora, rank=7)}
        started = time.monotonic()
        request = replace(edge.halves.request(), **changes)
        with pytest.raises(RefusedError, match=message), linked(edge, request):
            pass
        assert time.monotonic() - started < 3
        eventually(lambda: not [thread.name for thread in threading.enumerate() if "consume_request" in thread.name])


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "lion"},
        {"learning_rate": -1},
        {"learning_rate": float("nan")},
        {"weight_decay": float("inf")},
        {"decay_steps": 3, "warmup_steps": 3},
    ],
)
def test_optimizers_that_cannot_work(edge: ServedEdge, changes: dict[str, Any]) -> None:
    message = open_to_wire(edge.halves.request())
    message.optimizer.CopyFrom(split_pb2.Optimizer(**{"name": "adamw", "learning_rate": 0.1, **changes}))
    with contextlib.closing(Stranger(edge)) as stranger, pytest.raises(grpc.RpcError) as error:
        stranger.say(DeviceMessage(open=message), opened=False)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "optimizer" in str(error.value.details())


def step_with(change: Callable[[list[RawTensor]], object], **fields: int) -> Callable[[Halves], Any]:
    def make(halves: Halves) -> tuple[DeviceMessage, list[RawTensor]]:
        tensors = batch_to_wire(halves.batch())
        change(tensors)
        return DeviceMessage(step=split_pb2.Step(**{"step": 1, "version": 0, **fields})), tensors

    return make


def replaced(index: int, **changes: Any) -> Callable[[list[RawTensor]], None]:
    def change(tensors: list[RawTensor]) -> None:
        tensors[index] = replace(tensors[index], **changes)

    return change


def long_text(halves: Halves) -> Any:
    return DeviceMessage(step=split_pb2.Step(step=1)), batch_to_wire(halves.batch(tokens=200))


def nan(tensors: list[RawTensor]) -> None:
    tensors[0] = replace(tensors[0], data=np.full(3 * 6 * 32, np.nan, "f4").tobytes())


def headers_only(**changes: Any) -> Callable[[Halves], Any]:
    header = {
        "name": "activation",
        "dtype": tensor_pb2.FLOAT32,
        "shape": [2],
        "codec": tensor_pb2.RAW,
        "byte_length": 8,
        **changes,
    }
    return lambda halves: DeviceMessage(step=split_pb2.Step(step=1), tensors=[tensor_pb2.TensorHeader(**header)])


MALFORMED: dict[str, tuple[Callable[[Halves], Any], str]] = {
    "no open": (lambda halves: None, "must open a session"),
    "open twice": (lambda halves: DeviceMessage(open=open_to_wire(halves.request("stranger-2"))), "speaks for one session"),
    "empty": (lambda halves: DeviceMessage(), "empty message"),
    "chunk alone": (lambda halves: DeviceMessage(chunk=b"123"), "more bytes arrived"),
    "nan": (step_with(nan), "not finite"),
    "dtype": (step_with(replaced(0, dtype=tensor_pb2.BFLOAT16, shape=(3, 6, 64))), "dtype BFLOAT16, expected FLOAT32"),
    "hidden": (step_with(replaced(0, shape=(3, 3, 64))), "expected [?]x[?]x32"),
    "mask": (step_with(replaced(1, shape=(6, 3))), "expected 3x6"),
    "mask of 2s": (step_with(replaced(1, data=np.full((3, 6), 2).tobytes())), "values other than 0 and 1"),
    "labels": (step_with(replaced(2, shape=(3, 1))), "expected 3"),
    "label": (step_with(replaced(2, data=np.array([0, 1, 99]).tobytes())), "class indices"),
    "name": (step_with(replaced(1, name="mask")), "expected tensor 'attention_mask'"),
    "two tensors": (step_with(lambda tensors: tensors.pop()), "2 came"),
    "length": (headers_only(byte_length=7), "announces 7 bytes, expected 8"),
    "new message too early": (
        lambda halves: [headers_only()(halves), DeviceMessage(evaluate=split_pb2.Evaluate())],
        "a new message began",
    ),
    "2 GiB announced": (headers_only(shape=[2**29], byte_length=2**31), r"above limits.request_mb \(256000000 bytes\)"),
    "8 GiB announced": (headers_only(shape=[2**33], byte_length=2**35), "above limits.request_mb"),
    "step": (step_with(lambda tensors: None, step=3), "step 1 was due"),
    "version": (step_with(lambda tensors: None, version=1), "adopt first"),
    "too long": (long_text, "at most 128"),
    "version of a submission": (
        lambda halves: DeviceMessage(submit=split_pb2.SubmitHalf(submission="s/1", version=9)),
        "adopt first",
    ),
    "adopt what is not there": (lambda halves: DeviceMessage(adopt=split_pb2.Adopt(version=9)), "no version 9"),
}


def test_the_malformed_lose_their_stream_and_nobody_else_does(edge: ServedEdge) -> None:
    steps = len(MALFORMED) + 1
    expected = undisturbed(Halves(), Halves().request("honest"), steps)
    with linked(edge, edge.halves.request("honest")) as link, contextlib.closing(Stranger(edge)) as stranger:
        found = stepped(edge, link, range(1, 2))
        for number, (case, (make, reason)) in enumerate(MALFORMED.items(), start=2):
            made = make(edge.halves)
            messages = made if isinstance(made, list) else [made]
            with pytest.raises(grpc.RpcError) as error:
                if case == "no open":
                    stranger.say(DeviceMessage(evaluate=split_pb2.Evaluate()), opened=False)
                else:
                    stranger.say(*messages)
            codes = {"INVALID_ARGUMENT", "FAILED_PRECONDITION"} if "limits." not in reason else {"RESOURCE_EXHAUSTED"}
            assert error.value.code().name in codes, case
            assert re.search(reason, str(error.value.details())), (case, error.value.details())
            found += stepped(edge, link, range(number, number + 1))
        link.close()
    assert found == expected


def test_no_tensors_before_a_session(edge: ServedEdge) -> None:
    with contextlib.closing(Stranger(edge)) as stranger, pytest.raises(grpc.RpcError) as error:
        stranger.say(headers_only()(edge.halves), opened=False)
    assert "announces 8 bytes, more than the 0 allowed" in str(error.value.details())


def test_bytes_that_are_no_message_cost_only_their_stream(edge: ServedEdge) -> None:
    with linked(edge, edge.halves.request("honest")) as link:
        found = stepped(edge, link, range(1, 2))
        with grpc.insecure_channel(edge.address) as channel:
            with pytest.raises(grpc.RpcError):
                list(channel.stream_stream(METHOD, None, None)(iter([b"\xff\xff\xff not protobuf"]), timeout=5))
            with pytest.raises(grpc.RpcError):  # more than gRPC takes in one piece
                list(
                    channel.stream_stream(METHOD, None, None)(
                        iter([DeviceMessage(chunk=bytes(5 * 2**20)).SerializeToString()]), timeout=5
                    )
                )
        found += stepped(edge, link, range(2, 4))
    assert found == undisturbed(Halves(), Halves().request("honest"), 3)


def test_a_step_asked_again_is_counted_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics, served(Halves(), metrics=metrics) as edge, linked(edge) as link:
        first = link.step(1, 0, edge.halves.batch(1))
        again = link.step(1, 0, edge.halves.batch(1))
        assert again.loss == first.loss
        assert torch.equal(again.gradient, first.gradient)
        second = link.step(2, 0, edge.halves.batch(2))
        assert [first.loss, second.loss] == undisturbed(Halves(), edge.halves.request(), 2)
        assert edge.service.steps == 2
        assert [event["step"] for event in events(tmp_path, "step")] == [1, 2]
        with pytest.raises(RefusedError, match="step 5 of device-1 came, step 3 was due"):
            link.step(5, 0, edge.halves.batch())


def test_submissions_and_adoptions(edge: ServedEdge, tmp_path: Path) -> None:
    session = None
    with linked(edge) as link:
        stepped(edge, link, range(1, 3))
        link.submit("device-1/1", 0)
        link.submit("device-1/1", 0)
        eventually(lambda: edge.federation.submitted)
        session = edge.halves.engine.resume(edge.halves.request())
        assert session is not None
        sent = session.adapter.values()
        stepped(edge, link, range(3, 4))
        unsent = {key: value - sent[key] for key, value in session.adapter.values().items()}
        newer = edge.federation.publish(1)
        for _ in range(2):
            link.adopt(1, True)
            adopted = total(edge_half(newer, 2), unsent)
            assert all(np.array_equal(adopted[key], value) for key, value in session.adapter.values().items())
        with pytest.raises(RefusedError, match="asked with version 0, its half here stems from version 1"):
            link.step(4, 0, edge.halves.batch())
    with linked(edge) as link:  # back in the same session
        stepped(edge, link, range(4, 5), version=1)
        link.submit("device-1/2", 1)
        with pytest.raises(RefusedError, match="version 0 is older than 1"):
            link.adopt(0, True)
    with linked(edge) as link:
        link.close()
    assert [(header.submission, header.version) for header, _ in edge.federation.submitted] == [
        ("device-1/1", 0),
        ("device-1/2", 1),
    ]
    begin = edge_half(edge.halves.initial, 2)
    first = edge.federation.submitted[0][1]
    assert all(np.array_equal(first[key], sent[key] - begin[key]) for key in begin)
    assert first.keys() == begin.keys()


def test_close_waits_for_the_federation_even_when_asked_twice(edge: ServedEdge) -> None:
    edge.federation.open.clear()
    with linked(edge) as link:
        stepped(edge, link, range(1, 2))
        link.submit("device-1/1", 0)
        closing = threading.Thread(target=link.close)
        closing.start()
        time.sleep(0.2)
        edge.stop()  # the first try to close is lost
        edge.start()
        eventually(lambda: edge.service._streams)
        time.sleep(0.3)  # by now it has been asked again
        assert closing.is_alive()
        assert not edge.federation.submitted
        edge.federation.open.set()
        closing.join(10)
        assert not closing.is_alive()
        assert len(edge.federation.submitted) == 1


def test_a_lost_answer_to_close_is_answered_again(edge: ServedEdge) -> None:
    with linked(edge) as link:
        stepped(edge, link, range(1, 3))
        edge.run(edge.service._close(edge.halves.engine.resume(edge.halves.request())))  # type: ignore[arg-type]
        edge.stop()
        edge.start()
        link.close()


def test_halves_that_could_not_be_sent_go_out_with_the_next_one_and_at_the_end(
    edge: ServedEdge, caplog: pytest.LogCaptureFixture
) -> None:
    def arrived() -> list[str]:
        return [header.submission for header, _ in edge.federation.submitted]

    with caplog.at_level(logging.ERROR, "sfl"), linked(edge) as link:
        for number in (1, 2):
            stepped(edge, link, range(number, number + 1))
            edge.federation.failure = UnreachableError("no route")
            link.submit(f"device-1/{number}", 0)
            eventually(lambda number=number: caplog.text.count("submission device-1/1 waits: no route") == number)
        assert arrived() == []
        edge.federation.failure = None
        stepped(edge, link, range(3, 4))
        link.submit("device-1/3", 0)
        eventually(lambda: sorted(arrived()) == ["device-1/1", "device-1/2", "device-1/3"])
        edge.federation.failure = UnreachableError("no route")
        link.submit("device-1/4", 0)
        eventually(lambda: "submission device-1/4 waits" in caplog.text)
        edge.federation.failure = None
        link.close()
    assert sorted(arrived()) == [f"device-1/{number}" for number in range(1, 5)], "each once"


def test_a_version_that_cannot_be_fetched_for_now_ends_no_device(
    edge: ServedEdge, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    edge.federation.failure = UnreachableError("the federation server is out of reach (UNAVAILABLE: no route); gave up after 3 s")
    stranger = Stranger(edge)
    with pytest.raises(grpc.RpcError, match="the federation server is out of reach") as refused:
        stranger.say()
    stranger.close()
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    fetch, fetched = edge.federation.fetch, len(edge.federation.fetches)

    def mended(version: int, *layers: int, **more: int) -> Any:
        if len(edge.federation.fetches) > fetched:
            edge.federation.failure = None
        return fetch(version, *layers, **more)

    monkeypatch.setattr(edge.federation, "fetch", mended)
    with caplog.at_level(logging.WARNING, "sfl"), linked(edge) as link:
        stepped(edge, link, range(1, 2))
        link.close()
    assert "no route" in caplog.text and "opening the session again" in caplog.text


def test_a_half_that_is_lost_is_told_to_its_own_session_only(edge: ServedEdge, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "sfl"), linked(edge) as link:
        stepped(edge, link, range(1, 2))
        edge.federation.failure = RefusedError("the federation has finished")
        link.submit("device-1/1", 0)
        eventually(lambda: "device-1's submission device-1/1 is lost: the federation has finished" in caplog.text)
        with pytest.raises(
            RefusedError, match="a submitted half did not reach the federation server: the federation has finished"
        ):
            link.close()
    edge.federation.failure = None
    with linked(edge, edge.halves.request(session="started anew")) as link:
        stepped(edge, link, range(1, 2))
        link.close()


def test_a_session_that_is_replaced_leaves_nothing_behind(edge: ServedEdge) -> None:
    with linked(edge) as link:
        stepped(edge, link, range(1, 2))
        link.submit("device-1/1", 0)
    with linked(edge, edge.halves.request(session="started anew")):
        assert not edge.service._uploads._of_session


def test_the_session_of_a_device_that_is_gone_is_kept_for_so_long() -> None:
    with served(Halves(), keep_s=0.6) as edge:
        request = edge.halves.request()
        for numbers in (range(1, 2), range(2, 3), range(3, 4)):
            with linked(edge, request) as link:
                stepped(edge, link, numbers)
                time.sleep(0.3)
            time.sleep(0.4)  # within keep_s of its last stream, though not of the one before
            assert edge.halves.engine.resume(request) is not None
        eventually(lambda: edge.halves.engine.resume(request) is None)
        assert not edge.service._streams
        assert not edge.service._expiries
        assert not edge.service._uploads._of_session


def test_a_newer_stream_takes_the_session_over(edge: ServedEdge) -> None:
    with linked(edge) as first, linked(edge) as second:
        stepped(edge, second, range(1, 2))
        with pytest.raises(RefusedError, match="another stream has taken over the session of device-1"):
            stepped(edge, first, range(2, 3))
        stepped(edge, second, range(2, 3))
        second.close()


def test_an_error_inside_a_computation_ends_only_its_stream(edge: ServedEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, step = edge.halves.engine, edge.halves.engine.step

    def sometimes(session: Any, *args: Any) -> Any:
        if session.request.device == "unlucky":
            raise MemoryError("no room")
        return step(session, *args)

    monkeypatch.setattr(engine, "step", sometimes)
    with linked(edge, edge.halves.request("unlucky")) as unlucky, linked(edge) as link:
        with pytest.raises(SflError, match="no room"):
            stepped(edge, unlucky, range(1, 2))
        stepped(edge, link, range(1, 3))


def test_heartbeats_while_a_long_step_is_computed(edge: ServedEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "HEARTBEAT_S", 0.1)
    monkeypatch.setattr("sfl.device.edge_link.SILENCE_S", 0.8)
    step = edge.halves.engine.step
    calls = []

    def slow(*args: Any) -> Any:
        calls.append(1)
        time.sleep(1.6)
        return step(*args)

    monkeypatch.setattr(edge.halves.engine, "step", slow)
    with linked(edge) as link:
        assert stepped(edge, link, range(1, 2)) == undisturbed(Halves(), edge.halves.request(), 1)
    assert len(calls) == 1


def test_idle_sessions_cost_no_cpu(edge: ServedEdge) -> None:
    with contextlib.ExitStack() as stack:
        for index in range(6):
            link = stack.enter_context(linked(edge, edge.halves.request(f"device-{index}")))
            stepped(edge, link, range(1, 2))
        before = time.process_time()  # of edge and devices together
        time.sleep(2.0)
        assert time.process_time() - before < 0.2
