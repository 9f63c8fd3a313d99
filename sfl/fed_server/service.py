"""The federation behind gRPC: messages to calls of `Federation` and back."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import grpc.aio

from sfl.adapters.peft_format import AdapterWriteError
from sfl.connection_settings import LimitSettings
from sfl.errors import (
    AdapterError,
    BusyError,
    LimitError,
    MachineError,
    SflError,
    StateWriteError,
    UnknownMemberError,
    WireError,
)
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.messages import LONGEST_ID, LONGEST_NAME, half_from_wire, member_from_wire
from sfl.fed_server.placement import Placement
from sfl.fed_server.status import StatusBoard
from sfl.telemetry import log
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationServicer
from sfl.v1.split_pb2 import Heartbeat
from sfl.wire.adapters import from_tensors, to_tensors
from sfl.wire.channel import HEARTBEAT_S
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.refusals import refuse
from sfl.wire.tensors import RawTensor

Context = grpc.aio.ServicerContext[Any, Any]


class FederationService(FederationServicer):  # type: ignore[misc]
    """Answers members, all on one event loop. `traffic` counts the bytes of all frames that carry adapters."""

    def __init__(
        self,
        federation: Federation,
        heartbeat_s: float = HEARTBEAT_S,
        board: StatusBoard | None = None,
        limits: LimitSettings | None = None,
    ) -> None:
        self.traffic = Traffic()
        self._limits = limits or LimitSettings()
        self._board = board or StatusBoard(federation)
        self._federation = federation
        self._heartbeat_s = heartbeat_s
        self._watchers: set[asyncio.Event] = set()
        self._closing = False
        federation.on_change = self._wake

    def end_watches(self) -> None:
        """The server is about to stop: end what has no end of its own. Those who watch will ask again."""
        self._closing = True
        self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()

    async def Join(self, request: pb.JoinRequest, context: Context) -> pb.JoinReply:
        async with _refusing(context):
            member = member_from_wire(request)
            self._federation.require_own(member, request.federation)
            self._federation.join(member)
            if not member.edge:  # with one it is the same process, which has opened a session there
                self._board.joined(member.name)
        return pb.JoinReply(federation=self._federation.id)

    async def Watch(self, request: pb.WatchRequest, context: Context) -> None:
        """Write events until the federation has finished, for an edge server beyond that, or until the caller is gone."""
        changed = asyncio.Event()
        async with _refusing(context):
            self._federation.require_id(request.federation)
            self._federation.watch_begins(request.name)
            self._watchers.add(changed)
            try:
                await self._tell(request.name, changed, context)
            finally:
                self._watchers.discard(changed)
                self._federation.watch_ends(request.name)

    async def _tell(self, name: str, changed: asyncio.Event, context: Context) -> None:
        told: list[pb.Event] = []
        while True:
            changed.clear()
            state = list(self._events(name))
            for event in state:
                if event not in told:
                    await context.write(event)
            told = state
            if self._federation.failure is not None:
                raise self._federation.failure
            if self._closing or (self._federation.finished and not self._federation.serves_on(name)):
                return
            while not await _happens(changed, self._heartbeat_s):
                await context.write(pb.Event(heartbeat=Heartbeat()))

    def _events(self, name: str) -> Iterator[pb.Event]:
        """The state as events: what `name` must hear if it has heard nothing yet."""
        federation = self._federation
        if federation.agreement is None:
            yield pb.Event(waiting=self._waiting())
        else:
            agreement = federation.agreement
            yield pb.Event(
                agreement=pb.Agreement(
                    labels=agreement.labels,
                    columns=agreement.columns,
                    max_length=agreement.max_length,
                    policy=federation.policy(name),
                )
            )
        version = federation.version
        if federation.agreement is not None and version is None:
            yield pb.Event(waiting=self._waiting())
        if version is not None:
            yield pb.Event(published=pb.Published(version=version))
            if federation.finished:
                yield pb.Event(finished=pb.Finished(version=version))

    def _waiting(self) -> pb.Waiting:
        federation = self._federation
        return pb.Waiting(
            joined=federation.joined,
            expected=federation.expected,
            proposal=federation.agreement is not None,
            edges=federation.edges(),
        )

    async def Propose(self, requests: AsyncIterator[pb.AdapterMessage], context: Context) -> pb.ProposeReply:
        async with _refusing(context):
            first = await anext(requests, None)
            if first is not None and first.WhichOneof("body") == "proposal":  # none is read that is not needed
                answer = self._federation.proposed(first.proposal.edge)
                if answer is not None:
                    return pb.ProposeReply(accepted=answer)
            limit = round(self._limits.adapter_mb * 1e6)
            message, tensors = await self._receive(_with(first, requests), "proposal", limit, "limits.adapter_mb")
            header = message.proposal
            placement = Placement(header.blocks, tuple(header.head), header.num_layers)
            accepted = self._federation.propose(header.edge, placement, from_tensors(tensors))
        return pb.ProposeReply(accepted=accepted)

    async def Submit(self, requests: AsyncIterator[pb.AdapterMessage], context: Context) -> pb.SubmitReply:
        async with _refusing(context):
            limit = 2 * self._federation.adapter_bytes + 2**20  # room for a wrong half, which gets a better message
            header = pb.UpdateHeader()  # says whose it is once it is there
            try:
                message, tensors = await self._receive(requests, "update", limit)
                header = message.update
                half, state = half_from_wire(header), from_tensors(tensors)
            except WireError as error:
                self._federation.refuse(header.device[:LONGEST_NAME] or None, header.submission[:LONGEST_ID] or None, str(error))
                raise
            self._federation.submit(half, state)
        return pb.SubmitReply(whole=self._federation.has_whole(half))

    async def Fetch(self, request: pb.FetchRequest, context: Context) -> None:
        async with _refusing(context):
            layers = request.first_layer, request.last_layer
            version = (self._federation.version or 0) if request.newest else request.version
            state = self._federation.fetch(request.name, version, *layers, request.rank)
            message = pb.AdapterMessage(version=pb.VersionHeader(version=version))
            for frame in frames(message, to_tensors(state), self.traffic):
                await context.write(frame)

    async def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveReply:
        async with _refusing(context):
            (self._federation.trained if request.evaluates else self._federation.leave)(request.name)
        return pb.LeaveReply()

    async def Check(self, request: pb.JoinRequest, context: Context) -> pb.CheckReply:
        """A refusal is an answer here, and no failure of the call."""
        reply = pb.CheckReply(time=time.time())
        try:
            self._federation.check(member_from_wire(request))
        except SflError as error:
            reply.refusal, reply.error = str(error), error.number
        return reply

    async def Report(self, request: pb.ReportRequest, context: Context) -> pb.ReportReply:
        async with _refusing(context):
            self._board.report(request)
        return pb.ReportReply()

    async def Status(self, request: pb.StatusRequest, context: Context) -> pb.StatusReply:
        return self._board.status()

    async def _receive(
        self, requests: AsyncIterator[pb.AdapterMessage], kind: str, max_bytes: int, setting: str = ""
    ) -> tuple[pb.AdapterMessage, list[RawTensor]]:
        """The one message of a stream. Raises `WireError` when it is of another kind, incomplete or too large, `LimitError` where
        that is too large by a setting."""
        assembler: Assembler[pb.AdapterMessage] = Assembler(self.traffic, max_bytes, setting)
        async for frame in requests:
            whole = assembler.feed(frame)
            if whole is not None:
                message, tensors = whole
                if message.WhichOneof("body") != kind:
                    raise WireError(f"expected a message of kind '{kind}', got '{message.WhichOneof('body')}'")
                return message, tensors
        raise WireError(f"the stream ended before the last byte of '{kind}'")


async def _with(first: pb.AdapterMessage | None, rest: AsyncIterator[pb.AdapterMessage]) -> AsyncIterator[pb.AdapterMessage]:
    if first is not None:
        yield first
        async for message in rest:
            yield message


async def _happens(event: asyncio.Event, within_s: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), within_s)
    except asyncio.TimeoutError:
        return False
    return True


@contextlib.asynccontextmanager
async def _refusing(context: Context) -> AsyncIterator[None]:
    """Answer an `SflError` with its message, and a status that says whether trying again may help; after an `OSError` it may."""
    try:
        yield
    except OSError as error:
        log.error("%s", error)
        await refuse(context, grpc.StatusCode.UNAVAILABLE, MachineError(f"the federation server's machine refused: {error}"))
    except UnknownMemberError as error:  # clients join again and try again: see FederationClient
        await refuse(context, grpc.StatusCode.UNAVAILABLE, error)
    except (AdapterWriteError, StateWriteError) as error:  # a full disk, say: clients try again
        log.error("%s", error)
        await refuse(context, grpc.StatusCode.UNAVAILABLE, error)
    except BusyError as error:
        log.warning("refused for now: %s", error)
        await refuse(context, grpc.StatusCode.UNAVAILABLE, error)
    except LimitError as error:
        log.warning("refused: %s", error)
        await refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, error)
    except (WireError, AdapterError) as error:
        log.warning("refused: %s", error)
        await refuse(context, grpc.StatusCode.INVALID_ARGUMENT, error)
    except SflError as error:
        log.warning("refused: %s", error)
        await refuse(context, grpc.StatusCode.FAILED_PRECONDITION, error)
