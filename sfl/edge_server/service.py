"""Split training over gRPC: each stream is one device's session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio

from sfl.adapters.state import AdapterState
from sfl.edge_server.engine import EdgeEngine, Session
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ComputeWorker
from sfl.errors import RefusedError, SflError, WireError
from sfl.telemetry import MetricsWriter, log
from sfl.v1 import federation_pb2, split_pb2
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.v1.split_pb2_grpc import SplitTrainingServicer
from sfl.wire.channel import HEARTBEAT_S
from sfl.wire.federation import FederationClient
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.split import (
    CutBatch,
    SessionRequest,
    StepResult,
    batch_from_wire,
    evaluation_to_wire,
    open_from_wire,
    step_to_wire,
    terms_from_wire,
)
from sfl.wire.tensors import RawTensor

Answer = tuple[EdgeMessage, list[RawTensor]]
Result = TypeVar("Result")

MAX_BATCH_BYTES = 2**30  # of one request: 64 texts of 2048 tokens in bf16 at a hidden size of 4096, say


class SplitService(SplitTrainingServicer):
    """Takes requests apart, has them computed, and sends the halves of submissions on to the federation server.

    `keep_s` is how long the session of a device that is gone waits for its return.
    """

    def __init__(
        self,
        engine: EdgeEngine,
        worker: ComputeWorker,
        versions: EdgeVersions,
        federation: FederationClient,
        metrics: MetricsWriter,
        keep_s: float,
    ) -> None:
        self.traffic = Traffic()
        self.steps = 0
        self._engine = engine
        self._worker = worker
        self._versions = versions
        self._federation = federation
        self._metrics = metrics
        self._keep_s = keep_s
        self._streams: dict[str, object] = {}  # device -> the stream that speaks for it
        self._expiries: dict[str, asyncio.TimerHandle] = {}  # device -> when the session that no stream speaks for ends
        self._uploads: dict[str, dict[str, asyncio.Task[SflError | None]]] = {}  # device -> submission -> its half on its way

    async def Train(
        self, requests: AsyncIterator[DeviceMessage], context: grpc.aio.ServicerContext[DeviceMessage, EdgeMessage]
    ) -> AsyncIterator[EdgeMessage]:
        """One device's stream, until it closes its session or breaks off.

        From a request's first byte to its answer there are heartbeats: neither a slow uplink nor a slow edge is silent.
        """
        assembler: Assembler[DeviceMessage] = Assembler(self.traffic, max_bytes=0)  # no tensors before a session
        stream = _Stream()
        work: asyncio.Future[Any] | None = None  # what is being waited for
        try:
            while True:
                work = arrival = asyncio.ensure_future(anext(requests, None))
                while not await _done(arrival, HEARTBEAT_S if assembler.incomplete else None):
                    yield EdgeMessage(heartbeat=split_pb2.Heartbeat())
                frame = arrival.result()
                if frame is None:
                    break
                whole = assembler.feed(frame)
                if whole is None:
                    continue
                work = answer = asyncio.create_task(self._answer(stream, *whole))
                del whole, frame  # a stream that waits for its device's next batch holds no batch
                while not await _done(answer, HEARTBEAT_S):
                    yield EdgeMessage(heartbeat=split_pb2.Heartbeat())
                if stream.session is not None:
                    assembler.max_bytes = MAX_BATCH_BYTES
                for reply in frames(*answer.result(), self.traffic):
                    yield reply
        except WireError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except SflError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        finally:
            if work is not None:
                work.cancel()
            self._detach(stream)

    async def _answer(self, stream: _Stream, message: DeviceMessage, tensors: list[RawTensor]) -> Answer:
        kind = message.WhichOneof("body")
        if kind == "open":
            return await self._open(stream, message.open)
        session = self._session_of(stream)
        if kind == "step":
            return await self._step(session, message.step, tensors)
        if kind == "evaluate":
            return await self._evaluate(session, message.evaluate, tensors)
        if kind == "submit":
            return await self._submit(session, message.submit)
        if kind == "adopt":
            return await self._adopt(session, message.adopt)
        return await self._close(session)

    async def _open(self, stream: _Stream, message: split_pb2.Open) -> Answer:
        if stream.session is not None:
            raise WireError("a stream speaks for one session, and this one has opened it before")
        request = open_from_wire(message)
        session = self._engine.resume(request)
        if session is None:
            self._engine.check(request)
            self._uploads.pop(request.device, None)  # those of an earlier session
            state = await self._versions.get(request.version, request.rank)
            # Another stream of the device may have opened it in the meantime.
            session = await self._compute(request, lambda: self._engine.resume(request) or self._engine.open(request, state))
            log.info("%s opened a session at cut %d with version %d", request.device, request.cut, request.version)
        else:
            log.info("%s is back after step %d", request.device, session.last_step)
        stream.session = session
        self._streams[request.device] = stream
        self._stop_expiry(request.device)
        return EdgeMessage(opened=split_pb2.Opened(last_step=session.last_step)), []

    async def _step(self, session: Session, message: split_pb2.Step, tensors: list[RawTensor]) -> Answer:
        loop = asyncio.get_running_loop()
        arrived, terms = loop.time(), terms_from_wire(message)

        def compute() -> StepResult:
            started, before = loop.time(), session.last_step
            result = self._engine.step(session, message.step, message.version, self._batch(session, tensors), terms)
            if session.last_step > before:  # and so not answered again; counted even if the device is gone by now
                loop.call_soon_threadsafe(self._count, session, result, loop.time() - started, started - arrived)
            return result

        done, answer = step_to_wire(await self._compute(session.request, compute))
        return EdgeMessage(step=done), answer

    def _count(self, session: Session, result: StepResult, wall_s: float, queue_s: float) -> None:
        self.steps += 1
        self._metrics.write(
            "step",
            device=session.request.device,
            step=result.step,
            version=result.version,
            loss=result.loss,
            wall_s=round(wall_s, 6),
            queue_s=round(queue_s, 6),
        )

    async def _evaluate(self, session: Session, message: split_pb2.Evaluate, tensors: list[RawTensor]) -> Answer:
        result = await self._compute(
            session.request, lambda: self._engine.evaluate(session, message.version, self._batch(session, tensors))
        )
        evaluated, answer = evaluation_to_wire(result)
        return EdgeMessage(evaluated=evaluated), answer

    def _batch(self, session: Session, tensors: list[RawTensor]) -> CutBatch:
        return batch_from_wire(tensors, self._engine.hidden_size, session.request.dtype, self._engine.task == "causal-lm")

    async def _submit(self, session: Session, message: split_pb2.SubmitHalf) -> Answer:
        device = session.request.device
        uploads = self._uploads.setdefault(device, {})
        if message.submission not in uploads:
            progress = await self._compute(
                session.request, lambda: self._engine.take_progress(session, message.submission, message.version)
            )
            uploads[message.submission] = asyncio.create_task(self._upload(device, message, progress))
            self._metrics.write("submit", device=device, submission=message.submission, version=message.version)
        return EdgeMessage(submitted=split_pb2.HalfTaken(submission=message.submission)), []

    async def _upload(self, device: str, message: split_pb2.SubmitHalf, progress: AdapterState) -> SflError | None:
        """Send a half on; returns what kept it from arriving, as nobody asks a device's last upload when it never closes."""
        header = federation_pb2.UpdateHeader(
            submission=message.submission, device=device, half=federation_pb2.EDGE, version=message.version
        )
        try:
            await asyncio.to_thread(self._federation.submit, header, progress)
        except SflError as error:
            log.error("the edge's half of %s's submission %s is lost: %s", device, message.submission, error)
            return error
        return None

    async def _adopt(self, session: Session, message: split_pb2.Adopt) -> Answer:
        if message.version != session.adapter.version:
            state = await self._versions.get(message.version, session.request.rank)
            await self._compute(
                session.request, lambda: self._engine.adopt(session, message.version, state, message.keep_progress)
            )
            self._metrics.write("adopt", device=session.request.device, step=session.last_step, version=message.version)
        return EdgeMessage(adopted=split_pb2.Adopted(version=message.version)), []

    async def _close(self, session: Session) -> Answer:
        """Wait until the federation server has this device's halves: only then is the device done.

        The session stays as if the device had gone: should this answer be lost, it comes back and closes once more.
        """
        uploads = list(self._uploads.get(session.request.device, {}).values())
        if uploads:
            await asyncio.wait(uploads)
        for upload in uploads:
            if (error := upload.result()) is not None:
                raise RefusedError(f"a submitted half did not reach the federation server: {error}")
        session.closed = True
        log.info("%s closed its session after step %d", session.request.device, session.last_step)
        return EdgeMessage(closed=split_pb2.Closed()), []

    async def _compute(self, request: SessionRequest, compute: Callable[[], Result]) -> Result:
        """Have the worker do it. It alone touches tensors: OpenMP keeps threads for each thread that computes, and with more
        of them than cores all compute a tenth slower."""
        return await asyncio.wrap_future(self._worker.submit(request.cut, compute))

    def _session_of(self, stream: _Stream) -> Session:
        session = stream.session
        if session is None:
            raise WireError("the first message of a stream must open a session")
        if self._streams.get(session.request.device) is not stream or not self._engine.is_open(session):
            raise WireError(f"another stream has taken over the session of {session.request.device}")
        return session

    def _detach(self, stream: _Stream) -> None:
        session = stream.session
        if session is None or self._streams.get(session.request.device) is not stream:
            return
        device = session.request.device
        del self._streams[device]
        if not session.closed:
            log.warning("%s is gone after step %d; its session is kept for %g s", device, session.last_step, self._keep_s)
        self._stop_expiry(device)
        self._expiries[device] = asyncio.get_running_loop().call_later(self._keep_s, self._forget, session)

    def _stop_expiry(self, device: str) -> None:
        if (expiry := self._expiries.pop(device, None)) is not None:
            expiry.cancel()

    def _forget(self, session: Session) -> None:
        del self._expiries[session.request.device]
        self._uploads.pop(session.request.device, None)
        self._engine.close(session)


async def _done(work: asyncio.Future[Any], within_s: float | None) -> bool:
    return bool((await asyncio.wait({work}, timeout=within_s))[0])


class _Stream:
    """Which session a stream speaks for, once it has opened one."""

    session: Session | None = None
