"""The federation server as a device or an edge server sees it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

import grpc

from sfl.adapters.state import AdapterState, byte_size
from sfl.errors import SflError, StateDiffersError, UnknownMemberError, UnreachableError, WaitedError, WireError
from sfl.identity.node import Node
from sfl.telemetry import log
from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationStub
from sfl.wire.adapters import from_tensors, to_tensors
from sfl.wire.channel import SILENCE_S, dial, error_from, gave_up, retry, until_silent
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.refusals import number_of

PEER = "the federation server"
CALL_S = 300.0  # deadline of one call, a whole adapter's transfer included
_SAID_S = 30.0  # after which a server that stays away is said to do so again, and then after twice as long
_REPORT_S = 10.0  # of one that is small and can wait for its next time

Result = TypeVar("Result")


class Uplink(Protocol):
    """Hears what transfers to the federation server take."""

    def uploaded(self, size: int, seconds: float, failures: int) -> None:
        """`size` payload bytes have arrived after `seconds`, all tries and the pauses between them included."""

    def answered(self, seconds: float) -> None:
        """The answer to a small call began after `seconds`."""


class FederationClient:
    """Blocking calls to the federation server, each tried again until `give_up_s`, and a thread that watches it.

    A federation that begins anew, under the same address, is another one: an edge server goes on with that, and hears of it by
    `on_new_federation`, in the watching thread; for a device it is the end.

    `name` is this member's own. `traffic` counts the bytes of all frames, `uplink` hears what submissions and fetches
    take. While this member is `stopping`, what fails is not tried again. Every method raises `RefusedError` with the server's
    reason or `UnreachableError`.
    """

    def __init__(
        self,
        address: str,
        name: str,
        wait_s: float = 60.0,
        give_up_s: float = 300.0,
        uplink: Uplink | None = None,
        node: Node | None = None,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.traffic = Traffic()
        self._name = name
        self._uplink = uplink
        self._give_up_s = give_up_s
        self._channel = dial(address, PEER, wait_s, node, "fed")
        self._stub = FederationStub(self._channel)
        self.on_new_federation: Callable[[], object] = lambda: None
        self._stopping = stopping
        self._federation = ""  # id of the one that was joined
        self._wanted = False  # a proposal of version 0
        self._changed = threading.Condition()
        self._agreement: pb.Agreement | None = None
        self._newest: int | None = None
        self._finished = False
        self._failure: SflError | None = None
        self._state = "nothing heard yet"
        self._closed = threading.Event()
        self._watcher: threading.Thread | None = None
        self._request = pb.JoinRequest()
        self._edge = ""  # that the server was told of

    def join(self, request: pb.JoinRequest) -> None:
        """Take part, then watch what happens; a server that was started anew is joined again."""
        self._request = request
        self._retry(self._join)
        log.info("%s has joined the federation", self._name)
        self._watcher = threading.Thread(target=self._watch, name="watch-federation", daemon=True)
        self._watcher.start()

    def served_by(self, edge: str) -> None:
        """Tell which edge server this device has a session with, which may then submit the other halves of its updates."""
        if edge == self._edge:
            return
        request = pb.JoinRequest()
        request.CopyFrom(self._request)
        request.edge = edge
        self._request = request
        self._retry(self._join)
        self._edge = edge

    def _join(self) -> None:
        """Join, or join again; from the agreement on a device is refused by any other federation."""
        if self._agreement is not None:
            self._request.federation = self._federation
        joined: str = self._stub.Join(self._request, timeout=CALL_S).federation
        known, self._federation = self._federation, joined
        if known in ("", joined):
            return
        log.warning("%s has begun anew: what came of the federation before is at its end", PEER)
        with self._changed:
            self._agreement, self._newest, self._wanted, self._state = None, None, False, "nothing heard yet"
        self.on_new_federation()

    def propose(self, header: pb.ProposalHeader, state: AdapterState) -> bool:
        """Offer version 0; False if another edge server was first. One that could not be sent is wanted on."""
        message = pb.AdapterMessage(proposal=header)
        try:
            reply: pb.ProposeReply = self._retry(lambda: self._stub.Propose(self._frames(message, state), timeout=CALL_S))
        except UnreachableError:
            with self._changed:  # to one whose watch never broke nothing is said again
                self._wanted = self._agreement is not None and self._newest is None
            raise
        return reply.accepted

    def submit(self, header: pb.UpdateHeader, state: AdapterState) -> bool:
        """Send one half of an update; sent again, it counts once. A device's says how many of its tries have failed.

        Whether the server has the other half, too. An edge server's half of a device that is not known there (any more) is not
        tried again: `UnknownMemberError`.
        """
        message = pb.AdapterMessage(update=header)
        started, tries = time.monotonic(), 0

        def call() -> bool:
            nonlocal tries
            if tries and header.half == pb.DEVICE:
                message.update.link.failures = tries
            tries += 1
            try:
                reply: pb.SubmitReply = self._stub.Submit(self._frames(message, state), timeout=CALL_S)
            except grpc.RpcError as error:
                if header.half == pb.EDGE and number_of(error) == UnknownMemberError.number:
                    raise UnknownMemberError(str(error_from(error, PEER))) from error
                raise
            return reply.whole

        whole = self._retry(call)
        if self._uplink is not None:
            self._uplink.uploaded(byte_size(state), time.monotonic() - started, tries - 1)
        return whole

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0, rank: int | None = None) -> AdapterState:
        """The part of a published version in layers `first_layer` to `last_layer` - 1; to the end, with the head, for 0.

        Its factors are as a device of `rank` gets them, 0 for that of the LoRA settings; None for the rank that this member
        has joined with.
        """
        rank = self._request.rank if rank is None else rank
        return self._fetch(pb.FetchRequest(version=version, first_layer=first_layer, last_layer=last_layer, rank=rank))[1]

    def fetch_newest(self, last_layer: int) -> tuple[int, AdapterState]:
        """The newest version at the federation server, perhaps newer than `newest`, and what `fetch` gives of it."""
        return self._fetch(pb.FetchRequest(newest=True, last_layer=last_layer, rank=self._request.rank))

    def _fetch(self, request: pb.FetchRequest) -> tuple[int, AdapterState]:
        request.name = self._name

        def call() -> tuple[int, AdapterState]:
            assembler: Assembler[pb.AdapterMessage] = Assembler(self.traffic)
            started = time.monotonic()
            answer = self._stub.Fetch(request, timeout=CALL_S)
            answer.initial_metadata()  # comes first, and no slow link holds it up with the bytes of the adapter
            began_s = time.monotonic() - started
            for frame in answer:
                whole = assembler.feed(frame)
                if whole is not None:
                    if self._uplink is not None:
                        self._uplink.answered(began_s)
                    return whole[0].version.version, from_tensors(whole[1])
            raise WireError("a version ended before its last byte")

        return self._retry(call)

    def report(self, request: pb.ReportRequest) -> None:
        """Tell how this member is doing, once: what is lost on the way, the next report makes up for."""
        try:
            self._stub.Report(request, timeout=_REPORT_S)
        except grpc.RpcError as error:
            log.debug("a report was lost: %s", error_from(error, PEER))
        except ValueError:  # the channel was closed in the meantime
            return

    def check(self, request: pb.JoinRequest) -> pb.CheckReply:
        """Whether `join` would be refused, asked once; nothing changes."""
        try:
            reply: pb.CheckReply = self._stub.Check(request, timeout=_REPORT_S)
        except grpc.RpcError as error:
            raise error_from(error, PEER) from error
        return reply

    def status(self) -> pb.StatusReply:
        """How the federation is doing, asked once."""
        try:
            reply: pb.StatusReply = self._stub.Status(pb.StatusRequest(), timeout=_REPORT_S)
        except grpc.RpcError as error:
            raise error_from(error, PEER) from error
        return reply

    def until_wanted(self, agreed: pb.Agreement) -> None:
        """Block until the federation wants version 0 proposed: at its beginning, or once it has begun anew.

        Raises `StateDiffersError` when its devices have agreed on other labels by then than in `agreed`.
        """
        with self._changed:
            while self._failure is None:
                if self._agreement is not None and self._agreement.labels != agreed.labels:
                    raise StateDiffersError(
                        f"the devices have now agreed on the labels {', '.join(self._agreement.labels)}, and {self._name} was"
                        f" started with {', '.join(agreed.labels)}: start it again"
                    )
                if self._wanted:
                    self._wanted = False  # until it is said again
                    return
                self._changed.wait(10.0)
            raise self._failure

    def trained(self) -> None:
        """This device has done its steps and submitted what came of them; it leaves once it has evaluated."""
        self._retry(lambda: self._stub.Leave(pb.LeaveRequest(name=self._name, evaluates=True), timeout=CALL_S))

    def leave(self) -> None:
        """This device is done."""
        self._retry(lambda: self._stub.Leave(pb.LeaveRequest(name=self._name), timeout=CALL_S))

    def agreement(self, wait_s: float) -> pb.Agreement:
        """What all members have agreed on; blocks until it is there."""
        self._wait(lambda: self._agreement is not None, wait_s, "the other devices to join")
        if self._agreement is None:
            raise UnreachableError("the federation finished before its members had agreed")
        return self._agreement

    def version(self, at_least: int, wait_s: float) -> int:
        """The newest version, once it is `at_least` or the federation has finished; blocks until then."""
        self._wait(lambda: self._newest is not None and self._newest >= at_least, wait_s, f"version {at_least}")
        if self._newest is None:
            raise UnreachableError("the federation finished before it published a version")
        return self._newest

    @property
    def federation(self) -> str:
        """Id of the federation that was joined."""
        return self._federation

    @property
    def newest(self) -> int | None:
        """The newest version that was announced, None before the first; never blocks. Raises why nothing is heard any more."""
        self._require_watch()
        return self._newest

    @property
    def policy(self) -> pb.UploadPolicy | None:
        """The upload policy that was announced last, None before the agreement; never blocks."""
        return None if self._agreement is None else self._agreement.policy

    @property
    def finished(self) -> bool:
        """Whether the last device has left; never blocks. Raises why nothing is heard any more."""
        self._require_watch()
        return self._finished

    def close(self) -> None:
        """End the watch and the channel, and whatever waits or tries again in another thread."""
        self._closed.set()
        self._fail(UnreachableError(f"the connection to {PEER} was closed"))
        self._channel.close()
        if self._watcher is not None:
            self._watcher.join(timeout=5.0)

    def _retry(self, call: Callable[[], Result]) -> Result:
        def unless_closed() -> Result:
            if self._closed.is_set():
                raise UnreachableError(f"the connection to {PEER} was closed")
            self._require_watch()  # without it nobody would join again
            return call()

        return retry(unless_closed, PEER, self._give_up_s, self._closed.wait, self._stopping)

    def _require_watch(self) -> None:
        if self._failure is not None and not self._finished:
            raise self._failure

    def _fail(self, failure: SflError) -> None:
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _frames(self, message: pb.AdapterMessage, state: AdapterState) -> Iterator[pb.AdapterMessage]:
        fresh = pb.AdapterMessage()
        fresh.CopyFrom(message)  # `frames` adds headers, and a call may be tried again
        return frames(fresh, to_tensors(state), self.traffic)

    def _wait(self, ready: Callable[[], bool], wait_s: float, what: str) -> None:
        deadline = time.monotonic() + wait_s
        with self._changed:
            while not ready() and not self._finished:
                if self._failure is not None:
                    raise self._failure
                left = deadline - time.monotonic()
                if left <= 0:
                    raise WaitedError(f"waited {wait_s:g} s for {what} ({self._state}); gave up")
                if not self._changed.wait(min(left, 10.0)):
                    log.info("waiting for %s (%s)", what, self._state)

    def _watch(self) -> None:
        """Follow the server's events; when the stream breaks, follow them anew until `give_up_s` without one.

        A server that knows nothing of this member is joined again. An edge server does not give up, nor end with a run: it is
        there for whatever federation there will be. That the server is away is said when that begins and ever more seldom, and
        where the federation has finished it is no warning.
        """
        heard, unknown, joined_again, pause = time.monotonic(), False, False, 1.0
        stays, say_after = self._request.role == pb.EDGE, 0.0
        while not self._closed.is_set() and (stays or not self._finished):
            try:
                if unknown:
                    joined_again = True
                    self._join()
                    unknown = False
                request = pb.WatchRequest(name=self._name, federation=self._federation)
                for event in until_silent(self._stub.Watch(request), PEER, SILENCE_S):
                    if say_after:
                        log.info("%s is back", PEER)
                    heard, joined_again, pause, say_after = time.monotonic(), False, 1.0, 0.0
                    self._take(event)
                failure: SflError = UnreachableError(f"{PEER} has stopped")
            except grpc.RpcError as error:
                failure = error_from(error, PEER)
                unknown = unknown or number_of(error) == UnknownMemberError.number
            except UnreachableError as error:
                failure = error
            except ValueError:  # the channel was closed between two calls
                return
            if self._closed.is_set() or (self._finished and not stays):
                return
            if unknown and not joined_again:
                log.info("%s does not know %s: joining again", PEER, self._name)
                continue
            gone = time.monotonic() - heard
            late = gone > self._give_up_s and not stays
            if late and isinstance(failure, UnreachableError):
                failure = gave_up(failure, gone)
            if late or not isinstance(failure, UnreachableError):
                log.error("the watch has ended: %s", failure)
                self._fail(failure)
                return
            if gone >= say_after:
                again = f"tried for {gone:.0f} s so far" if say_after else f"watching again in {pause:.0f} s"
                log.log(logging.INFO if self._finished else logging.WARNING, "%s; %s", failure, again)
                say_after = max(_SAID_S, 2 * gone)
            self._closed.wait(pause)
            pause = min(pause + 1.0, 5.0)

    def _take(self, event: pb.Event) -> None:
        kind = event.WhichOneof("body")
        with self._changed:
            if kind == "waiting":
                self._state = _missing(event.waiting)
                self._wanted = event.waiting.proposal
            elif kind == "agreement":
                self._agreement = event.agreement
                self._state = "all have joined"
            elif kind == "published":
                self._wanted = self._finished = False  # another run of the same federation may have begun
                self._newest = max(self._newest or 0, event.published.version)
                self._state = f"version {self._newest} is the newest"
            elif kind == "finished":
                self._newest = event.finished.version
                self._finished = True
            self._changed.notify_all()


def _missing(waiting: pb.Waiting) -> str:
    """What a federation lacks before its first version."""
    if not waiting.proposal:
        return f"{waiting.joined} of {waiting.expected} devices have joined"
    if not waiting.edges:
        return "all have joined but an edge server, which version 0 has to come from: start one with `sfl edge`"
    return f"all have joined; version 0 is to come from the edge server {' or '.join(waiting.edges)}"
