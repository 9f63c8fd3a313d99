"""What a device and an edge server reach over the network, reached in one process: every message through its real encoding.

A message is made into frames, these into bytes, and the bytes are read, checked and counted as they would be on arrival, so a
run in one process sends what daemons send, to the byte. What takes time over a network takes simulated time here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic

from sfl.adapters.state import AdapterState, byte_size
from sfl.device.link_meter import LinkMeter
from sfl.edge_server.engine import EdgeEngine
from sfl.errors import WireError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.messages import half_from_wire
from sfl.fed_server.placement import Placement
from sfl.simulated_time import Clock, DeviceSpeed, Post
from sfl.v1 import federation_pb2, split_pb2
from sfl.v1.federation_pb2 import AdapterMessage, UpdateHeader
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.wire.adapters import from_tensors, to_tensors
from sfl.wire.frames import Assembler, Frame, Traffic, frames
from sfl.wire.split import (
    ORDINARY,
    CutBatch,
    Evaluation,
    SessionRequest,
    Standing,
    StepResult,
    StepTerms,
    batch_from_wire,
    batch_to_wire,
    evaluation_from_wire,
    evaluation_to_wire,
    open_from_wire,
    open_to_wire,
    standing_from_wire,
    step_from_wire,
    step_request,
    step_to_wire,
    terms_from_wire,
)
from sfl.wire.tensors import RawTensor

_NO_TIME_S = 1e-6  # what a meter is told of a transfer that takes no simulated time

Tamper = Callable[[UpdateHeader, AdapterState], AdapterState]


class Pipe(Generic[Frame]):
    """One direction between two ends; either counts the bytes."""

    def __init__(self, sender: Traffic, receiver: Traffic) -> None:
        self._sender = sender
        self._assembler: Assembler[Frame] = Assembler(receiver)

    def carry(self, message: Frame, tensors: Sequence[RawTensor] = ()) -> tuple[Frame, list[RawTensor]]:
        """The message as it arrives. Raises `WireError` as `Assembler.feed` does."""
        for frame in frames(message, tensors, self._sender):
            whole = self._assembler.feed(type(frame).FromString(frame.SerializeToString()))
            if whole is not None:
                return whole
        raise WireError("a message ended before its last byte")


class LocalFederation:
    """The federation server as the member `name` reaches it; `server` is the server's own traffic.

    `tamper` may put other tensors in the place of an update's before they are sent. Transfers take the time that `speed` says and
    are told to `uplink`; a submission arrives by `post`, or without one at once.
    """

    def __init__(
        self,
        federation: Federation,
        name: str,
        server: Traffic,
        *,
        rank: int = 0,
        speed: DeviceSpeed | None = None,
        clock: Clock | None = None,
        post: Post | None = None,
        tamper: Tamper | None = None,
    ) -> None:
        self.traffic = Traffic()
        self.uplink = LinkMeter()
        self._federation = federation
        self.name = name
        self._rank = rank
        self._speed = speed or DeviceSpeed()
        self._clock = clock or Clock()
        self._post = post
        self._tamper = tamper
        self._up: Pipe[AdapterMessage] = Pipe(self.traffic, server)
        self._down: Pipe[AdapterMessage] = Pipe(server, self.traffic)

    @property
    def newest(self) -> int | None:
        return self._federation.version

    @property
    def policy(self) -> federation_pb2.UploadPolicy:
        return self._federation.policy(self.name)

    @property
    def finished(self) -> bool:
        return self._federation.finished

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0, rank: int | None = None) -> AdapterState:
        state = self._federation.fetch(self.name, version, first_layer, last_layer, self._rank if rank is None else rank)
        message = AdapterMessage(version=federation_pb2.VersionHeader(version=version))
        before = self.traffic.received
        state = from_tensors(self._down.carry(message, to_tensors(state))[1])
        self._clock.now += self._speed.transfer_s(self.traffic.received - before)
        self.uplink.answered(max(self._speed.round_trip_s, _NO_TIME_S))
        return state

    def fetch_newest(self, last_layer: int) -> tuple[int, AdapterState]:
        version = self._federation.version or 0
        return version, self.fetch(version, 0, last_layer)

    def submit(self, header: UpdateHeader, state: AdapterState) -> bool:
        if self._tamper is not None:
            state = self._tamper(header, state)
        message = AdapterMessage()
        message.update.CopyFrom(header)
        before = self.traffic.sent
        arrived, tensors = self._up.carry(message, to_tensors(state))
        seconds = self._speed.transfer_s(self.traffic.sent - before)
        self._clock.now += seconds
        try:
            half, sent = half_from_wire(arrived.update), from_tensors(tensors)
        except WireError as error:
            self._federation.refuse(header.device, header.submission, str(error))
            raise
        if self._post is None:
            self._federation.submit(half, sent)
        else:
            self._post.send(self._clock.now, self.name, partial(self._federation.submit, half, sent))
        self.uplink.uploaded(byte_size(state), max(seconds, _NO_TIME_S), 0)
        return True  # the edge's half arrives no later

    def trained(self) -> None:
        """Nobody is told: to evaluate takes no simulated time."""

    def propose(self, placement: Placement, state: AdapterState) -> None:
        header = federation_pb2.ProposalHeader(
            edge=self.name, blocks=placement.blocks, head=placement.head, num_layers=placement.num_layers
        )
        arrived, tensors = self._up.carry(AdapterMessage(proposal=header), to_tensors(state))
        found = Placement(arrived.proposal.blocks, tuple(arrived.proposal.head), arrived.proposal.num_layers)
        self._federation.propose(arrived.proposal.edge, found, from_tensors(tensors))


class LocalEdgeServer:
    """An edge server without its network: the engine, the versions that it has fetched, and its traffic with devices."""

    kept = 2  # versions, as sfl.edge_server.versions keeps them

    def __init__(self, engine: EdgeEngine, federation: LocalFederation) -> None:
        self.engine = engine
        self.federation = federation
        self.traffic = Traffic()
        self._versions: dict[tuple[int, int], AdapterState] = {}  # by version and rank

    def version(self, version: int, rank: int) -> AdapterState:
        """The edge's part of a version as devices of `rank` get it, fetched once for all of them."""
        if (version, rank) not in self._versions:
            self._versions[version, rank] = self.federation.fetch(version, self.engine.lowest_cut, rank=rank)
            newest = sorted({number for number, _ in self._versions})[-self.kept :]
            self._versions = {key: state for key, state in self._versions.items() if key[0] in newest}
        return self._versions[version, rank]


class LocalEdge:
    """The edge server as one device reaches it. Its half of a submission reaches the federation server before the device's."""

    def __init__(
        self, server: LocalEdgeServer, request: SessionRequest, speed: DeviceSpeed | None = None, clock: Clock | None = None
    ) -> None:
        self.traffic = Traffic()
        self._server = server
        self._engine = server.engine
        self._speed = speed or DeviceSpeed()
        self._clock = clock or Clock()
        self._request = request
        self._up: Pipe[DeviceMessage] = Pipe(self.traffic, server.traffic)
        self._down: Pipe[EdgeMessage] = Pipe(server.traffic, self.traffic)

    def begin(self, session: str, version: int, last_step: int = 0, checkpoint: int = 0) -> None:
        """Open the session; before anything else."""
        request = replace(self._request, session=session, version=version)
        standing = Standing(checkpoints=(checkpoint,) if checkpoint else (), last_step=last_step)
        opening = self._up.carry(DeviceMessage(open=open_to_wire(request, standing)))[0].open
        arrived, stands = open_from_wire(opening), standing_from_wire(opening)
        self._engine.check(arrived)
        self._session = self._engine.open(arrived, self._server.version(arrived.version, arrived.rank), stands.last_step)
        opened = split_pb2.Opened(
            last_step=self._session.last_step, checkpoint=stands.first_checkpoint, edge=self._server.federation.name
        )
        self._down.carry(EdgeMessage(opened=opened))

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY, checkpoint: int = 0) -> StepResult:
        message = DeviceMessage(step=step_request(step, version, terms, checkpoint))
        arrived, tensors = self._up.carry(message, batch_to_wire(batch))
        asked = arrived.step
        result = self._engine.step(self._session, asked.step, asked.version, self._batch(tensors), terms_from_wire(asked))
        done, answer = step_to_wire(result)
        reply, tensors = self._down.carry(EdgeMessage(step=done), answer)
        self._clock.now += self._speed.step_s
        return step_from_wire(reply.step, tensors, batch.activation)

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        message = DeviceMessage(evaluate=split_pb2.Evaluate(version=version))
        arrived, tensors = self._up.carry(message, batch_to_wire(batch))
        result = self._engine.evaluate(self._session, arrived.evaluate.version, self._batch(tensors))
        evaluated, answer = evaluation_to_wire(result)
        reply, tensors = self._down.carry(EdgeMessage(evaluated=evaluated), answer)
        return evaluation_from_wire(reply.evaluated, tensors, len(batch.activation))

    def look(self) -> None:
        """It is here."""

    def submit(self, submission: str, version: int, checkpoint: int = 0) -> None:
        request = split_pb2.SubmitHalf(submission=submission, version=version, checkpoint=checkpoint)
        asked = self._up.carry(DeviceMessage(submit=request))[0].submit
        progress = self._engine.take_progress(self._session, asked.submission, asked.version)
        device = self._session.request.device
        header = UpdateHeader(submission=asked.submission, device=device, half=federation_pb2.EDGE, version=asked.version)
        self._server.federation.submit(header, progress)
        self._down.carry(EdgeMessage(submitted=split_pb2.HalfTaken(submission=asked.submission)))

    def adopt(self, version: int, keep_progress: bool, checkpoint: int = 0) -> None:
        request = split_pb2.Adopt(version=version, keep_progress=keep_progress, checkpoint=checkpoint)
        asked = self._up.carry(DeviceMessage(adopt=request))[0].adopt
        if asked.version != self._session.adapter.version:
            state = self._server.version(asked.version, self._session.request.rank)
            self._engine.adopt(self._session, asked.version, state, asked.keep_progress)
        self._down.carry(EdgeMessage(adopted=split_pb2.Adopted(version=asked.version)))

    def close(self) -> None:
        """End the session, as a device does after its last step."""
        self._up.carry(DeviceMessage(close=split_pb2.Close()))
        self._down.carry(EdgeMessage(closed=split_pb2.Closed()))

    def values(self) -> AdapterState:
        """The edge's half of the device's adapter."""
        return self._session.adapter.values()

    def _batch(self, tensors: list[RawTensor]) -> CutBatch:
        per_token = self._engine.task == "causal-lm"
        return batch_from_wire(tensors, self._engine.hidden_size, self._session.request.dtype, per_token)
