"""Split training over gRPC: each stream is one device's session."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any, TypeVar

import grpc
import grpc.aio

from sfl.adapters.state import AdapterState
from sfl.connection_settings import LimitSettings
from sfl.edge_server.engine import EdgeEngine, Session
from sfl.edge_server.keeper import Keeper
from sfl.edge_server.session_files import SessionFiles
from sfl.edge_server.uploads import HalfUploads, TakenHalf
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ComputeWorker
from sfl.errors import BusyError, LimitError, MachineError, SflError, StateWriteError, UnreachableError, WireError
from sfl.telemetry import MetricsWriter, log
from sfl.v1 import split_pb2
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.v1.split_pb2_grpc import SplitTrainingServicer
from sfl.wire.channel import HEARTBEAT_S
from sfl.wire.federation import FederationClient
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.refusals import refuse
from sfl.wire.split import (
    CutBatch,
    SessionRequest,
    Standing,
    StepResult,
    batch_from_wire,
    evaluation_to_wire,
    open_from_wire,
    standing_from_wire,
    step_to_wire,
    terms_from_wire,
)
from sfl.wire.tensors import RawTensor

Answer = tuple[EdgeMessage, list[RawTensor]]
Result = TypeVar("Result")

_AGAIN_S = 5.0  # after which halves are tried again for which the federation server was away for too long


class SplitService(SplitTrainingServicer):
    """Takes requests apart, has them computed, and sends the halves of submissions on to the federation server.

    `keep_s` is how long the session of a device that is gone waits for its return in memory; in `files`, where its
    checkpoints are kept, it waits longer. Without `files` a session ends with this service.
    Whatever changes a session, its file included, is done by the worker, and so one thing at a time.
    """

    def __init__(
        self,
        engine: EdgeEngine,
        worker: ComputeWorker,
        versions: EdgeVersions,
        federation: FederationClient,
        metrics: MetricsWriter,
        keep_s: float,
        files: SessionFiles | None = None,
        name: str = "",
        limits: LimitSettings | None = None,
    ) -> None:
        self.traffic = Traffic()
        self.steps = 0
        self._engine = engine
        self._worker = worker
        self._versions = versions
        self._federation = federation
        self._metrics = metrics
        self._keep_s = keep_s
        self._name = name
        self._limits = limits or LimitSettings()
        self._uploads = HalfUploads(federation, keep_s)
        self._files = files
        self._keeper = Keeper(engine, self._uploads, files)
        self._stopping = asyncio.Event()
        self._streams: dict[str, object] = {}  # device -> the stream that speaks for it
        self._expiries: dict[str, asyncio.TimerHandle] = {}  # device -> when the session that no stream speaks for ends

    def send_kept(self) -> None:
        """Begin to send the halves that an earlier edge server had taken and not sent, as its files say; `send_again` goes on
        with it where these cannot be read for the moment."""
        try:
            self._keeper.send_kept()
        except OSError as error:
            log.error("halves of sessions on disk cannot be read: %s; they are tried again every %g s", error, _AGAIN_S)

    def begin_anew(self) -> None:
        """The federation is another one: its versions are others, and halves that were taken for the last are of no use."""
        self._versions.forget()
        self._uploads.drop()

    def stop(self) -> None:
        """Answer what has been asked, and end the streams; their devices find their sessions when the edge is back."""
        self._stopping.set()

    async def sweep_hourly(self, keep_s: float) -> None:
        """Delete, now and then, the files and halves of devices that have not been here for so long; never ends."""
        while self._files is not None:
            self._uploads.sweep(keep_s, self._engine.devices())
            try:
                await asyncio.to_thread(self._files.sweep, keep_s, self._engine.devices())
            except OSError as error:
                log.error("the files of sessions cannot be looked through: %s", error)
            await asyncio.sleep(min(keep_s, 3600.0))

    async def send_again(self) -> None:
        """Send halves, as soon as that is possible, that could not be sent when it was their time; never ends."""
        while True:
            await asyncio.sleep(_AGAIN_S)
            with contextlib.suppress(OSError):  # which was said
                self._keeper.send_kept()
            self._uploads.start_unsent()

    async def Train(
        self, requests: AsyncIterator[DeviceMessage], context: grpc.aio.ServicerContext[DeviceMessage, EdgeMessage]
    ) -> AsyncIterator[EdgeMessage]:
        """One device's stream, until it closes its session or breaks off.

        From a request's first byte to its answer there are heartbeats: neither a slow uplink nor a slow edge is silent.
        """
        assembler: Assembler[DeviceMessage] = Assembler(self.traffic, max_bytes=0)  # no tensors before a session
        stream = _Stream()
        work: asyncio.Future[Any] | None = None  # what is being waited for
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            while True:
                work = arrival = asyncio.ensure_future(anext(requests, None))
                while not await _done(arrival, HEARTBEAT_S if assembler.incomplete else None, or_else=stopping):
                    if stopping.done():
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "the edge server is told to stop")
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
                    assembler.max_bytes, assembler.limit = round(self._limits.request_mb * 1e6), "limits.request_mb"
                for reply in frames(*answer.result(), self.traffic):
                    yield reply
        except OSError as error:  # too many open files, say: the device asks again, and by then there may be fewer
            log.error("%s", error)
            await refuse(context, grpc.StatusCode.UNAVAILABLE, MachineError(f"the edge server's machine refused: {error}"))
        except (StateWriteError, UnreachableError) as error:  # the same: there may be room, or the federation server be back
            log.error("%s", error)
            await refuse(context, grpc.StatusCode.UNAVAILABLE, error)
        except WireError as error:
            await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, error)
        except BusyError as error:  # the same, as others may have gone by then
            await refuse(context, grpc.StatusCode.UNAVAILABLE, error)
        except LimitError as error:
            await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error)
        except SflError as error:
            await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, error)
        finally:
            stopping.cancel()
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
        if kind == "pause":
            return await self._pause(session, message.pause)
        return await self._close(session)

    async def _open(self, stream: _Stream, message: split_pb2.Open) -> Answer:
        if stream.session is not None:
            raise WireError("a stream speaks for one session, and this one has opened it before")
        request, standing = open_from_wire(message), standing_from_wire(message)
        self._keeper.send_kept()
        session = None if standing.restored else self._engine.resume(request)
        self._require_room(request)
        if session is not None:
            log.info("%s is back after step %d", request.device, session.last_step)
        elif (session := await self._compute(request, partial(self._keeper.restored, request, standing))) is not None:
            step, checkpoint = session.last_step, session.checkpoint
            log.info("%s goes on from checkpoint %d, step %d", request.device, checkpoint, step)
            self._metrics.write("resume", device=request.device, step=step, checkpoint=checkpoint)
        if not standing.resume:
            session = await self._begun(request, standing)
        if session is None:
            return EdgeMessage(opened=split_pb2.Opened(lost=True, edge=self._name)), []
        stream.session = session
        self._streams[request.device] = stream
        self._stop_expiry(request.device)
        for half in self._uploads.unsent(request.device):
            self._uploads.start(half)
        self._tell(session, "open")
        opened = split_pb2.Opened(last_step=session.last_step, checkpoint=session.checkpoint, edge=self._name)
        return EdgeMessage(opened=opened), []

    async def _begun(self, request: SessionRequest, standing: Standing) -> Session:
        """The session that begins, or has begun when its device asked before."""
        state: AdapterState = {}
        if self._engine.resume(request) is None:
            self._engine.check(request)
            self._uploads.end_session(request.device)
            state = await self._versions.get(request.version, request.rank)
            log.info("%s opens a session at cut %d with version %d", request.device, request.cut, request.version)

        def begin() -> Session:
            # Another stream of the device may have opened it in the meantime.
            session = self._engine.resume(request) or self._engine.open(request, state, standing.last_step)
            self._keeper.keep(session, standing.first_checkpoint)
            return session

        return await self._compute(request, begin)

    def _require_room(self, request: SessionRequest) -> None:
        """Raise `BusyError` when this edge server has as many sessions as it may."""
        devices = self._engine.devices()
        if request.device not in devices and len(devices) >= self._limits.sessions:
            raise BusyError(
                f"{self._name or 'the edge server'} has sessions with {len(devices)} devices, as many as limits.sessions allows:"
                f" raise it there, or connect {request.device} to another edge server"
            )

    async def _step(self, session: Session, message: split_pb2.Step, tensors: list[RawTensor]) -> Answer:
        loop = asyncio.get_running_loop()
        arrived, terms = loop.time(), terms_from_wire(message)

        def compute() -> StepResult:
            started, before = loop.time(), session.last_step
            self._keeper.keep(session, message.checkpoint)
            result = self._engine.step(session, message.step, message.version, self._batch(session, tensors), terms)
            if session.last_step > before:  # and so not answered again; counted even if the device is gone by now
                loop.call_soon_threadsafe(self._count, session, result, loop.time() - started, started - arrived)
            return result

        done, answer = step_to_wire(await self._in(session, compute))
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
        result = await self._in(session, lambda: self._engine.evaluate(session, message.version, self._batch(session, tensors)))
        evaluated, answer = evaluation_to_wire(result)
        return EdgeMessage(evaluated=evaluated), answer

    def _batch(self, session: Session, tensors: list[RawTensor]) -> CutBatch:
        return batch_from_wire(tensors, self._engine.hidden_size, session.request.dtype, self._engine.task == "causal-lm")

    async def _submit(self, session: Session, message: split_pb2.SubmitHalf) -> Answer:
        """Set a half aside. Only what is kept in a checkpoint, if the device keeps any, is sent on."""
        device, loop = session.request.device, asyncio.get_running_loop()

        def take() -> None:
            progress = self._engine.take_progress(session, message.submission, message.version)
            half = TakenHalf(device, message.submission, message.version, progress)
            self._keeper.keep(session, message.checkpoint, half)
            loop.call_soon_threadsafe(self._uploads.start, half)  # even if the device is gone by now

        if not self._uploads.knows(device, message.submission):
            self._uploads.require_room(device)
            await self._in(session, take)
            self._metrics.write("submit", device=device, submission=message.submission, version=message.version)
        return EdgeMessage(submitted=split_pb2.HalfTaken(submission=message.submission)), []

    async def _adopt(self, session: Session, message: split_pb2.Adopt) -> Answer:
        if message.version != session.adapter.version or message.checkpoint != session.checkpoint:
            state: AdapterState = {}
            if message.version != session.adapter.version:
                state = await self._versions.get(message.version, session.request.rank)

            def adopt() -> bool:
                newer = message.version != session.adapter.version  # than another stream of the device has left it
                self._engine.adopt(session, message.version, state, message.keep_progress)
                self._keeper.keep(session, message.checkpoint)
                return newer

            if await self._in(session, adopt):
                self._metrics.write("adopt", device=session.request.device, step=session.last_step, version=message.version)
        return EdgeMessage(adopted=split_pb2.Adopted(version=message.version)), []

    async def _pause(self, session: Session, message: split_pb2.Pause) -> Answer:
        """Keep the session on disk alone."""
        await self._in(session, lambda: self._keeper.keep(session, message.checkpoint))
        if self._files is not None and not session.request.rules.shared_edge_adapter:
            session.closed = True
            self._engine.close(session)
        log.info("%s stops for now after step %d", session.request.device, session.last_step)
        return EdgeMessage(paused=split_pb2.Paused()), []

    async def _close(self, session: Session) -> Answer:
        """Wait until the federation server has this device's halves: only then is the device done.

        The session stays as if the device had gone: should this answer be lost, it comes back and closes once more.
        """
        await self._uploads.finish(session.request.device)
        session.closed = True
        files = self._files
        if files is not None:
            await self._in(session, lambda: files.delete(session.request.device))
        log.info("%s closed its session after step %d", session.request.device, session.last_step)
        return EdgeMessage(closed=split_pb2.Closed()), []

    async def _in(self, session: Session, compute: Callable[[], Result]) -> Result:
        """`_compute` for a session, unless it is not the device's any more when its turn comes."""

        def guarded() -> Result:
            self._require_open(session)
            return compute()

        return await self._compute(session.request, guarded)

    async def _compute(self, request: SessionRequest, compute: Callable[[], Result]) -> Result:
        """Have the worker do it. It alone touches tensors: OpenMP keeps threads for each thread that computes, and with more
        of them than cores all compute a tenth slower."""
        return await asyncio.wrap_future(self._worker.submit(request.cut, compute))

    def _session_of(self, stream: _Stream) -> Session:
        session = stream.session
        if session is None:
            raise WireError("the first message of a stream must open a session")
        if self._streams.get(session.request.device) is not stream:
            raise _taken_over(session)
        self._require_open(session)
        return session

    def _require_open(self, session: Session) -> None:
        if not self._engine.is_open(session):
            raise _taken_over(session)

    def _detach(self, stream: _Stream) -> None:
        session = stream.session
        if session is None or self._streams.get(session.request.device) is not stream:
            return
        device = session.request.device
        del self._streams[device]
        if not session.closed and not self._stopping.is_set():
            log.warning("%s is gone after step %d; its session is kept for %g s", device, session.last_step, self._keep_s)
        self._tell(session, "closed" if session.closed else "gone")
        self._stop_expiry(device)
        self._expiries[device] = asyncio.get_running_loop().call_later(self._keep_s, self._forget, session)

    def _stop_expiry(self, device: str) -> None:
        if (expiry := self._expiries.pop(device, None)) is not None:
            expiry.cancel()

    def _forget(self, session: Session) -> None:
        del self._expiries[session.request.device]
        self._uploads.end_session(session.request.device)
        self._engine.close(session)
        self._tell(session, "forgotten")

    def _tell(self, session: Session, state: str) -> None:
        self._metrics.write("session", device=session.request.device, state=state, step=session.last_step)


async def _done(work: asyncio.Future[Any], within_s: float | None, or_else: asyncio.Future[Any] | None = None) -> bool:
    """Whether `work` is done, once it is, or `or_else`, or the time is over."""
    others = set[asyncio.Future[Any]]() if or_else is None else {or_else}
    await asyncio.wait({work} | others, timeout=within_s, return_when=asyncio.FIRST_COMPLETED)
    return work.done()


def _taken_over(session: Session) -> WireError:
    return WireError(f"another stream has taken over the session of {session.request.device}")


class _Stream:
    """Which session a stream speaks for, once it has opened one."""

    session: Session | None = None
