"""Messages in frames: put together as they were taken apart, and whatever else arrives is refused at once."""

from __future__ import annotations

import itertools
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.adapters.state import AdapterKey
from sfl.errors import WireError
from sfl.v1 import federation_pb2, split_pb2, tensor_pb2
from sfl.v1.federation_pb2 import AdapterMessage
from sfl.v1.federation_pb2_grpc import FederationServicer, FederationStub, add_FederationServicer_to_server
from sfl.v1.split_pb2 import DeviceMessage
from sfl.wire.adapters import from_tensors, to_tensors
from sfl.wire.frames import CHUNK_BYTES, Assembler, Traffic, frames
from sfl.wire.tensors import RawTensor, from_numpy, to_numpy

MIB = 2**20


def step(number: int = 1) -> DeviceMessage:
    return DeviceMessage(step=split_pb2.Step(step=number, version=3))


def arrays(*sizes: int) -> list[RawTensor]:
    rng = np.random.default_rng(sum(sizes))
    return [from_numpy(f"t{i}", rng.integers(-(2**60), 2**60, size)) for i, size in enumerate(sizes)]


def assembled(stream: list[DeviceMessage]) -> list[tuple[DeviceMessage, list[RawTensor]]]:
    traffic = Traffic()
    assembler: Assembler[DeviceMessage] = Assembler(traffic)
    whole = [
        done for frame in stream if (done := assembler.feed(DeviceMessage.FromString(frame.SerializeToString()))) is not None
    ]
    assert traffic.received == sum(frame.ByteSize() for frame in stream)
    return whole


SIZES = st.lists(st.sampled_from([0, 1, 7, 1000, CHUNK_BYTES // 8 - 1, CHUNK_BYTES // 8, CHUNK_BYTES // 8 + 1]), max_size=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(SIZES, min_size=1, max_size=3))
def test_messages_of_any_sizes_come_out_as_they_went_in(messages: list[list[int]]) -> None:
    sent = [(step(i), arrays(*sizes)) for i, sizes in enumerate(messages)]
    traffic = Traffic()
    stream = [
        frame
        for message, tensors in sent
        for frame in frames(DeviceMessage.FromString(message.SerializeToString()), tensors, traffic)
    ]
    assert max(frame.ByteSize() for frame in stream) <= MIB
    assert traffic.sent == sum(frame.ByteSize() for frame in stream)
    got = assembled(stream)
    assert len(got) == len(sent)
    for (message, tensors), (got_message, got_tensors) in zip(sent, got):
        assert got_message.step == message.step
        assert [(t.name, t.dtype, t.shape, bytes(t.data)) for t in got_tensors] == [
            (t.name, t.dtype, t.shape, bytes(t.data)) for t in tensors
        ]


@given(st.lists(st.integers(0, 64), max_size=8))
def test_chunks_may_be_of_any_size(places: list[int]) -> None:
    tensors = arrays(3, 0, 5)
    first, *_ = frames(step(), tensors, Traffic())
    data = b"".join(bytes(tensor.data) for tensor in tensors)
    cuts = [0, *sorted(places), len(data)]
    ((_, got),) = assembled(
        [first, *(DeviceMessage(chunk=data[left:right]) for left, right in itertools.pairwise(cuts) if left < right)]
    )
    assert [bytes(tensor.data) for tensor in got] == [bytes(tensor.data) for tensor in tensors]


def test_a_scalar_and_a_big_matrix_arrive_together() -> None:
    tensors = [from_numpy("scalar", np.array(4, dtype="i8")), from_numpy("big", np.ones((700, 500), dtype="f4"))]
    ((_, (scalar, big)),) = assembled(list(frames(step(), tensors, Traffic())))
    assert to_numpy(scalar).shape == ()
    assert to_numpy(scalar) == 4
    assert to_numpy(big).sum() == 350_000


def test_more_bytes_than_announced() -> None:
    first, chunk = frames(step(), arrays(4), Traffic())
    with pytest.raises(WireError, match="more bytes arrived"):
        assembled([first, DeviceMessage(chunk=chunk.chunk + b"x")])
    with pytest.raises(WireError, match="more bytes arrived"):
        assembled([first, chunk, DeviceMessage(chunk=b"x")])
    with pytest.raises(WireError, match="more bytes arrived"):
        assembled([DeviceMessage(chunk=b"x")])
    with pytest.raises(WireError, match="more bytes arrived"):
        assembled([step(), DeviceMessage(chunk=b"x")])


def test_a_header_before_the_last_byte() -> None:
    first, chunk = frames(step(), arrays(4), Traffic())
    with pytest.raises(WireError, match="a new message began when bytes of 'step' were still due"):
        assembled([first, DeviceMessage(chunk=chunk.chunk[:-1]), step(2)])
    assert assembled([first, DeviceMessage(chunk=chunk.chunk[:-1])]) == []


def test_messages_that_cannot_be() -> None:
    with pytest.raises(WireError, match="empty message"):
        assembled([DeviceMessage()])
    wrong, _ = frames(step(), arrays(4), Traffic())
    wrong.tensors[0].byte_length = 31
    with pytest.raises(WireError, match="announces 31 bytes, expected 32"):
        assembled([wrong])
    many = step()
    many.tensors.extend(tensor_pb2.TensorHeader(dtype=tensor_pb2.INT64, shape=[0], codec=tensor_pb2.RAW) for _ in range(100_001))
    with pytest.raises(WireError, match="100001 tensors"):
        assembled([many])
    big, _ = frames(step(), arrays(4, 4), Traffic())
    with pytest.raises(WireError, match="announces 64 bytes, more than the 63 allowed"):
        Assembler[DeviceMessage](Traffic(), max_bytes=63).feed(big)


def test_an_announcement_alone_takes_no_memory() -> None:
    big = step()
    big.tensors.add(name="activation", dtype=tensor_pb2.FLOAT32, shape=[2**28], codec=tensor_pb2.RAW, byte_length=2**30)
    tracemalloc.start()
    try:
        assembler: Assembler[DeviceMessage] = Assembler(Traffic())
        assert assembler.feed(big) is None
        assembler.feed(DeviceMessage(chunk=bytes(1000)))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


class Shelf(FederationServicer):  # type: ignore[misc]
    """Keeps what is submitted and gives it back; a server of grpc's own defaults."""

    def __init__(self) -> None:
        self.kept: list[RawTensor] = []

    def Submit(self, requests: Any, context: Any) -> federation_pb2.SubmitReply:
        assembler: Assembler[AdapterMessage] = Assembler(Traffic())
        (self.kept,) = (whole[1] for frame in requests if (whole := assembler.feed(frame)) is not None)
        return federation_pb2.SubmitReply()

    def Fetch(self, request: Any, context: Any) -> Any:
        yield from frames(AdapterMessage(version=federation_pb2.VersionHeader(version=1)), self.kept, Traffic())


def test_megabytes_pass_grpc_with_its_default_limits() -> None:
    state = {
        AdapterKey(layer, "q", "A"): np.random.default_rng(layer).normal(size=(8, 60_000)).astype("f4") for layer in range(12)
    }
    server = grpc.server(ThreadPoolExecutor(2))
    add_FederationServicer_to_server(Shelf(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = FederationStub(channel)
            message = AdapterMessage(update=federation_pb2.UpdateHeader(submission="1"))
            stub.Submit(frames(message, to_tensors(state), Traffic()), timeout=20)
            assembler: Assembler[AdapterMessage] = Assembler(Traffic())
            stream = list(stub.Fetch(federation_pb2.FetchRequest(), timeout=20))
            *_, whole = (assembler.feed(frame) for frame in stream)
    finally:
        server.stop(0)
    assert whole is not None
    back = from_tensors(whole[1])
    assert sum(value.nbytes for value in back.values()) > 20 * MIB
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[key], state[key]) for key in state)


def test_adapters_with_wrong_tensors_are_refused() -> None:
    good = {AdapterKey(0, "q", "A"): np.ones((2, 3), dtype="f4"), AdapterKey(1, "q", "A"): np.zeros((0, 3), dtype="f4")}
    back = from_tensors([RawTensor(t.name, t.dtype, t.shape, bytearray(t.data)) for t in to_tensors(good)])
    assert back.keys() == good.keys()
    assert all(np.array_equal(back[key], good[key]) for key in good)
    tensor = to_tensors(good)[0]
    with pytest.raises(WireError, match="came twice"):
        from_tensors([tensor, tensor])
    with pytest.raises(WireError, match="no adapter key"):
        from_tensors([from_numpy("q", np.ones(2, dtype="f4"))])
    with pytest.raises(WireError, match="not float32"):
        from_tensors([from_numpy("0/q/A", np.ones(2, dtype="f2"))])
    with pytest.raises(WireError, match="not finite"):
        from_tensors([from_numpy("0/q/A", np.full(2, np.nan, dtype="f4"))])
