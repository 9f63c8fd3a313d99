"""The edge over gRPC: one stream, which is made anew when it breaks."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import grpc

from sfl.device.trainer import WentBack
from sfl.errors import BusyError, SessionLostError, UnreachableError, WireError
from sfl.identity.node import Node
from sfl.telemetry import log
from sfl.v1 import split_pb2 as pb
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.v1.split_pb2_grpc import SplitTrainingStub
from sfl.wire.channel import SILENCE_S, dial, error_from, gave_up
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.split import (
    ORDINARY,
    CutBatch,
    Evaluation,
    SessionRequest,
    Standing,
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
_FIRST_PAUSE_S = 0.2
_LAST_S = 2.0  # for an edge that has gone, of a device that is told to stop: it has often been told so, too


class GrpcEdgeLink:
    """Asks one thing at a time and waits for its answer.

    A stream that breaks is opened again under the same session and the last request repeated; the edge answers a step,
    submission or adoption that it has already done without doing it twice. `give_up_s` bounds how long that is tried without a
    word from the edge; how long that takes for an answer, with its heartbeats, does not count. A stream that broke after the edge
    had begun to answer is the first one to do so, and an edge that says that it is busy with what it has from this device is
    asked until it is not.
    `on_edge` hears the edge server's name whenever a stream was opened. `held` tells which checkpoints of the session this device
    has, and so can go back to. While this device is `stopping` a lost edge is soon given up. What is raised, `EdgeLink` says.
    """

    def __init__(
        self,
        address: str,
        request: SessionRequest,
        wait_s: float,
        give_up_s: float,
        node: Node | None = None,
        on_edge: Callable[[str], None] = lambda edge: None,
        held: Callable[[], tuple[int, ...]] = tuple,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.traffic = Traffic()
        self._request = request
        self._give_up_s = give_up_s
        self._held = held
        self._stopping = stopping
        self._steps_done = 0
        self._begins: Standing | None = Standing()  # as the session begins, until the edge has changed something in it
        self._restored = False  # this process has a session of an earlier one, and the edge has not heard of that yet
        self._stream: _Stream | None = None
        self._answers = False  # the edge has said anything since it was asked
        self._heard = 0.0  # when the edge said anything last
        self._on_edge = on_edge
        self._channel = dial(address, PEER, wait_s, node, "edge")
        self._stub = SplitTrainingStub(self._channel)

    def begin(self, session: str | None = None, version: int | None = None, last_step: int = 0, checkpoint: int = 0) -> None:
        """Open a session; what is not given is as in the request."""
        self._end_stream()
        given: dict[str, Any] = {"session": session, "version": version}
        self._request = replace(self._request, **{name: value for name, value in given.items() if value is not None})
        self._begins = Standing(checkpoints=(checkpoint,) if checkpoint else (), last_step=last_step)
        self._steps_done, self._restored = last_step, False
        self._ask(None)

    def resume(self, session: str) -> int:
        """Open a session that an earlier process of this device has begun; the checkpoint at which the edge is then.

        Raises `SessionLostError` when it is at none that this device holds.
        """
        self._request, self._begins, self._restored = replace(self._request, session=session), None, True
        opened = self._ask(None)[0].opened
        self._steps_done = opened.last_step
        return opened.checkpoint

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY, checkpoint: int = 0) -> StepResult:
        request = step_request(step, version, terms, checkpoint)
        reply, tensors = self._ask(DeviceMessage(step=request), batch_to_wire(batch))
        self._require(reply, "step")
        result = step_from_wire(reply.step, tensors, batch.activation)
        self._steps_done, self._begins = step, None
        return result

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        reply, tensors = self._ask(DeviceMessage(evaluate=pb.Evaluate(version=version)), batch_to_wire(batch))
        self._require(reply, "evaluated")
        return evaluation_from_wire(reply.evaluated, tensors, len(batch.activation))

    def submit(self, submission: str, version: int, checkpoint: int = 0) -> None:
        request = pb.SubmitHalf(submission=submission, version=version, checkpoint=checkpoint)
        reply, _ = self._ask(DeviceMessage(submit=request))
        self._require(reply, "submitted")
        self._begins = None

    def adopt(self, version: int, keep_progress: bool, checkpoint: int = 0) -> None:
        request = pb.Adopt(version=version, keep_progress=keep_progress, checkpoint=checkpoint)
        reply, _ = self._ask(DeviceMessage(adopt=request))
        self._require(reply, "adopted")
        self._begins = None

    def look(self) -> None:
        if self._stream is not None and not self._stream.broken:
            return
        self._end_stream()
        try:
            self._open()
        except UnreachableError as error:
            log.warning("%s; nothing is wanted of it yet", error)
            self._end_stream()

    def pause(self, checkpoint: int) -> None:
        """Have the edge keep its state under this number, and nothing in memory, until the session is resumed."""
        reply, _ = self._ask(DeviceMessage(pause=pb.Pause(checkpoint=checkpoint)))
        self._require(reply, "paused")

    def close(self) -> None:
        """End the session; returns when the federation server has every half that the edge took."""
        reply = None
        while reply is None:
            try:
                reply, _ = self._ask(DeviceMessage(close=pb.Close()))
            except WentBack:  # nothing comes that could be wrong then
                continue
            except SessionLostError as error:
                log.warning("%s; it cannot be closed, and need not be", error)
                return
        self._require(reply, "closed")
        self.hang_up()

    def hang_up(self) -> None:
        """Leave without a word; the edge keeps the session for a while."""
        self._end_stream()
        self._channel.close()

    def _end_stream(self) -> None:
        if self._stream is not None:
            self._stream.end()
            self._stream = None

    def _ask(self, message: DeviceMessage | None, tensors: Sequence[RawTensor] = ()) -> tuple[EdgeMessage, list[RawTensor]]:
        """The answer to `message`, or to opening the session if there is none."""
        gone, pause = 0.0, _FIRST_PAUSE_S
        while True:
            self._heard = time.monotonic()
            asked = False
            try:
                if self._stream is None:
                    opened = self._open()
                    if message is None:
                        return opened, []
                if message is not None and self._stream is not None:
                    asked, self._answers = True, False
                    return self._stream.exchange(_fresh(message), tensors)
            except UnreachableError as error:
                self._end_stream()
                busy = asked and error.number == BusyError.number
                if asked and self._answers and error.number == UnreachableError.number:  # the way broke, and had been mended
                    gone, pause = 0.0, _FIRST_PAUSE_S
                gone = 0.0 if busy else gone + time.monotonic() - self._heard
                stopping = self._stopping()
                if gone + pause > (min(_LAST_S, self._give_up_s) if stopping else self._give_up_s) and not busy:
                    raise gave_up(error, gone) from error
                level = logging.INFO if stopping else logging.WARNING
                log.log(level, "%s; opening the session again in %.1f s", error, pause)
            time.sleep(pause)
            gone, pause = gone + pause, min(pause * 2, 5.0)

    def _hear(self) -> None:
        self._heard = time.monotonic()
        self._answers = True

    def _open(self) -> EdgeMessage:
        """Open a stream. Raises `WentBack` or `SessionLostError` when the edge knows less than this device has done."""
        self._stream = _Stream(self._stub, self.traffic, self._hear)
        standing = self._begins or Standing(resume=True, restored=self._restored, checkpoints=self._held())
        reply, _ = self._stream.exchange(DeviceMessage(open=open_to_wire(self._request, standing)), ())
        self._require(reply, "opened")
        opened = reply.opened
        behind = opened.last_step < self._steps_done and not self._restored
        if opened.lost or (behind and not opened.checkpoint):
            self._end_stream()
            raise SessionLostError(
                f"{PEER} knows nothing of this device's session, or no checkpoint of it that this device has: what its half of"
                " the adapter had learnt and not submitted is lost"
            )
        self._restored = False
        if opened.edge:
            self._on_edge(opened.edge)
        if behind:
            self._steps_done = opened.last_step
            raise WentBack(opened.checkpoint)
        return reply

    def _require(self, reply: EdgeMessage, kind: str) -> None:
        if reply.WhichOneof("body") != kind:
            raise WireError(f"{PEER} answered '{reply.WhichOneof('body')}' where '{kind}' was due")


def _fresh(message: DeviceMessage) -> DeviceMessage:
    copy = DeviceMessage()
    copy.CopyFrom(message)  # sending adds the tensors' headers
    return copy


class _Stream:
    """One gRPC stream: frames out through a queue, frames in through a reader thread, so that every wait has an end.

    `hear` is called at each frame that has come.
    """

    def __init__(self, stub: SplitTrainingStub, traffic: Traffic, hear: Callable[[], object]) -> None:
        self._traffic = traffic
        self._hear = hear
        self._assembler: Assembler[EdgeMessage] = Assembler(traffic)
        self._outgoing: queue.SimpleQueue[DeviceMessage | None] = queue.SimpleQueue()
        self._incoming: queue.SimpleQueue[EdgeMessage | grpc.RpcError | None] = queue.SimpleQueue()
        self.broken = False  # the edge, or the way to it, has ended it
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
            self._hear()
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
        self.broken = True
