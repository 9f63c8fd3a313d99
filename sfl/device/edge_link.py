"""The edge over gRPC: one stream, which is made anew when it breaks."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence

import grpc

from sfl.errors import RefusedError, UnreachableError, WireError
from sfl.telemetry import log
from sfl.v1 import split_pb2 as pb
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.v1.split_pb2_grpc import SplitTrainingStub
from sfl.wire.channel import SILENCE_S, dial, error_from
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.split import (
    ORDINARY,
    CutBatch,
    Evaluation,
    SessionRequest,
    StepResult,
    StepTerms,
    batch_to_wire,
    evaluation_from_wire,
    open_to_wire,
    step_from_wire,
    step_request,
)
from sfl.wire.tensors import RawTensor

PEER = "the edge server"


class GrpcEdgeLink:
    """Asks one thing at a time and waits for its answer.

    A stream that breaks is opened again under the same session and the last request repeated; the edge answers a step,
    submission or adoption that it has already done without doing it twice. `give_up_s` bounds how long that is tried.
    """

    def __init__(self, address: str, request: SessionRequest, wait_s: float, give_up_s: float) -> None:
        self.traffic = Traffic()
        self._request = request
        self._give_up_s = give_up_s
        self._steps_done = 0
        self._stream: _Stream | None = None
        self._channel = dial(address, PEER, wait_s)
        self._stub = SplitTrainingStub(self._channel)
        try:
            self._ask(None)
        except BaseException:
            self.hang_up()
            raise

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY) -> StepResult:
        reply, tensors = self._ask(DeviceMessage(step=step_request(step, version, terms)), batch_to_wire(batch))
        self._require(reply, "step")
        result = step_from_wire(reply.step, tensors, batch.activation)
        self._steps_done = step
        return result

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        reply, tensors = self._ask(DeviceMessage(evaluate=pb.Evaluate(version=version)), batch_to_wire(batch))
        self._require(reply, "evaluated")
        return evaluation_from_wire(reply.evaluated, tensors, len(batch.activation))

    def submit(self, submission: str, version: int) -> None:
        reply, _ = self._ask(DeviceMessage(submit=pb.SubmitHalf(submission=submission, version=version)))
        self._require(reply, "submitted")

    def adopt(self, version: int, keep_progress: bool) -> None:
        reply, _ = self._ask(DeviceMessage(adopt=pb.Adopt(version=version, keep_progress=keep_progress)))
        self._require(reply, "adopted")

    def close(self) -> None:
        """End the session; returns when the federation server has every half that the edge took."""
        reply, _ = self._ask(DeviceMessage(close=pb.Close()))
        self._require(reply, "closed")
        self.hang_up()

    def hang_up(self) -> None:
        """Leave without a word; the edge keeps the session for a while."""
        if self._stream is not None:
            self._stream.end()
        self._channel.close()

    def _ask(self, message: DeviceMessage | None, tensors: Sequence[RawTensor] = ()) -> tuple[EdgeMessage, list[RawTensor]]:
        """The answer to `message`, or to opening the session if there is none."""
        started, pause = time.monotonic(), 0.2
        while True:
            try:
                if self._stream is None:
                    opened = self._open()
                    if message is None:
                        return opened, []
                if message is not None and self._stream is not None:
                    return self._stream.exchange(_fresh(message), tensors)
            except UnreachableError as error:
                if self._stream is not None:
                    self._stream.end()
                    self._stream = None
                gone = time.monotonic() - started
                if gone + pause > self._give_up_s:
                    raise UnreachableError(f"{error}; gave up after {gone:.0f} s") from error
                log.warning("%s; opening the session again in %.1f s", error, pause)
            time.sleep(pause)
            pause = min(pause * 2, 5.0)

    def _open(self) -> EdgeMessage:
        self._stream = _Stream(self._stub, self.traffic)
        reply, _ = self._stream.exchange(DeviceMessage(open=open_to_wire(self._request)), ())
        self._require(reply, "opened")
        if reply.opened.last_step < self._steps_done:
            raise RefusedError(
                f"{PEER} knows this session only up to step {reply.opened.last_step}, not {self._steps_done}: it was restarted,"
                " or this device was gone for too long, and its half of the adapter is lost; start the device again"
            )
        return reply

    def _require(self, reply: EdgeMessage, kind: str) -> None:
        if reply.WhichOneof("body") != kind:
            raise WireError(f"{PEER} answered '{reply.WhichOneof('body')}' where '{kind}' was due")


def _fresh(message: DeviceMessage) -> DeviceMessage:
    copy = DeviceMessage()
    copy.CopyFrom(message)  # sending adds the tensors' headers
    return copy


class _Stream:
    """One gRPC stream: frames out through a queue, frames in through a reader thread, so that every wait has an end."""

    def __init__(self, stub: SplitTrainingStub, traffic: Traffic) -> None:
        self._traffic = traffic
        self._assembler: Assembler[EdgeMessage] = Assembler(traffic)
        self._outgoing: queue.SimpleQueue[DeviceMessage | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[EdgeMessage | grpc.RpcError | None] = queue.SimpleQueue()
        self._call = stub.Train(self._requests())
        threading.Thread(target=self._read, name="edge-stream", daemon=True).start()

    def exchange(self, message: DeviceMessage, tensors: Sequence[RawTensor]) -> tuple[EdgeMessage, list[RawTensor]]:
        """Send a message and wait for the answer. Raises `UnreachableError` when the stream broke or went silent."""
        for frame in frames(message, tensors, self._traffic):
            self._outgoing.put(frame)
        while True:
            try:
                frame_in = self._incoming.get(timeout=SILENCE_S)
            except queue.Empty:
                raise UnreachableError(f"{PEER} was silent for {SILENCE_S:g} s") from None
            if frame_in is None:
                raise UnreachableError(f"{PEER} ended the stream")
            if isinstance(frame_in, grpc.RpcError):
                raise error_from(frame_in, PEER)
            if frame_in.WhichOneof("body") == "heartbeat":
                continue
            whole = self._assembler.feed(frame_in)
            if whole is not None:
                return whole

    def end(self) -> None:
        self._outgoing.put(None)
        self._call.cancel()

    def _requests(self) -> Iterator[DeviceMessage]:
        while (frame := self._outgoing.get()) is not None:
            yield frame

    def _read(self) -> None:
        try:
            for frame in self._call:
                self._incoming.put(frame)
            self._incoming.put(None)
        except grpc.RpcError as error:
            self._incoming.put(error)
