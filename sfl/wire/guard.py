"""Stands before every service of a server: who calls, whether they may, and how much of the server they take.

Services behind it know nothing of certificates. Whatever a call is refused for ends that call and no other.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import grpc
import grpc.aio

from sfl.connection_settings import LimitSettings
from sfl.errors import BusyError, OwnCertificateError, RightsError, WireError
from sfl.identity.peer import Peer, peer_of
from sfl.identity.revoked import Revocations
from sfl.identity.rights import Serves
from sfl.telemetry import log
from sfl.wire.call import CallEndedError, GuardedCall, lenient
from sfl.wire.limits import Allowance
from sfl.wire.refusals import refuse

Context = grpc.aio.ServicerContext[Any, Any]

LOOK_S = 1.0  # between two looks for revoked and expired certificates among those whose calls are open
_SAY_EVERY_S = 10.0  # most often that refusals of one node are logged
_SAID = 1000  # nodes, or connections, whose last refusal is remembered


class Guard(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # which only its stubs have
    """With `revoked` every caller has a certificate and is held to it; without, there is no TLS, calls are told apart by their
    connection, and only limits apply. `serves` says whether a device has a session with an edge server. For one event loop.
    """

    def __init__(
        self, limits: LimitSettings, revoked: Revocations | None = None, serves: Serves = lambda device, edge: None
    ) -> None:
        self.refused = 0  # calls
        self._limits = limits
        self._revoked = revoked
        self._serves = serves
        self._calls: set[GuardedCall] = set()
        self._allowances: dict[str, Allowance] = {}  # of those with open calls
        self._looking: asyncio.TimerHandle | None = None
        self._said: dict[str, float] = {}  # when a refusal of whom was logged last

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Makes of each handler one that reads a stream: so a call whose request never comes ends too, and the first message is
        looked at before the service hears of the call."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method: str = handler_call_details.method

        async def answer(requests: AsyncIterator[Any], context: Context) -> Any:
            async with self._call(method, context) as call:
                return await _begun(handler, await _request(handler, call.messages(requests)), context)

        async def stream(requests: AsyncIterator[Any], context: Context) -> None:
            async with self._call(method, context) as call:
                replies = _begun(handler, await _request(handler, call.messages(requests)), context)
                if not inspect.isasyncgen(replies):  # it writes by itself
                    await replies
                    return
                async with contextlib.aclosing(replies):
                    async for reply in replies:
                        await context.write(reply)

        kind = grpc.stream_stream_rpc_method_handler if handler.response_streaming else grpc.stream_unary_rpc_method_handler
        guarded: Any = stream if handler.response_streaming else answer
        return kind(guarded, lenient(handler.request_deserializer), handler.response_serializer)

    @contextlib.asynccontextmanager
    async def _call(self, method: str, context: Context) -> AsyncIterator[GuardedCall]:
        """A call from its beginning to its end; what the guard ends it for is told to the caller."""
        peer = None if self._revoked is None else peer_of(context.auth_context())
        who = context.peer() if peer is None or peer.identity is None else str(peer.identity)
        allowance = self._allowances.setdefault(who, Allowance(self._limits, who))
        call = GuardedCall(method, peer, self._limits, allowance, self._serves)
        try:
            with self._open(call, allowance):
                yield call
        except CallEndedError as error:
            self._say(who, method, error)
            await refuse(context, error.code, error.error)
        finally:
            if not allowance.calls:
                self._allowances.pop(who, None)

    @contextlib.contextmanager
    def _open(self, call: GuardedCall, allowance: Allowance) -> Iterator[None]:
        if self._revoked is not None:
            self._revoked.refresh()
        if (ended := self._invalid(call.peer)) is not None:
            raise ended
        try:
            allowance.begin_call()
        except BusyError as error:
            raise CallEndedError(error) from error
        self._calls.add(call)
        self._look_later()
        try:
            yield
        except asyncio.CancelledError:
            if call.ended is None:  # the caller hung up, or the server stops
                raise
            raise call.ended from None
        finally:
            allowance.end_call()
            self._calls.discard(call)
            call.close()

    def _invalid(self, peer: Peer | None) -> CallEndedError | None:
        """Why a certificate that was good in the handshake is not any more."""
        if self._revoked is None:
            return None
        if peer is None:
            return CallEndedError(RightsError("no certificate was shown"))
        if peer.serial in self._revoked:
            revoked = OwnCertificateError(f"the certificate of {peer.identity} is revoked")
            return CallEndedError(revoked, grpc.StatusCode.PERMISSION_DENIED)
        if peer.until < time.time():  # not final: a renewed one is shown on the next connection
            expired = OwnCertificateError(f"the certificate of {peer.identity} has expired: renew it with `sfl certs renew`")
            return CallEndedError(expired, grpc.StatusCode.UNAUTHENTICATED)
        return None

    def _look_later(self) -> None:
        if self._revoked is not None and self._looking is None and self._calls:
            self._looking = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def _look(self) -> None:
        """End the open calls of those whose certificate was revoked or has expired in the meantime."""
        self._looking = None
        if self._revoked is not None:
            self._revoked.refresh()
        for call in list(self._calls):
            if (ended := self._invalid(call.peer)) is not None:
                call.end(ended)
        self._look_later()

    def _say(self, who: str, method: str, error: CallEndedError) -> None:
        self.refused += 1
        now = time.monotonic()
        if now - self._said.get(who, -_SAY_EVERY_S) >= _SAY_EVERY_S:
            if len(self._said) >= _SAID:
                self._said.clear()
            self._said[who] = now
            log.warning("refused %s, which called %s: %s", who, method, error)


async def _request(handler: Any, messages: AsyncIterator[Any]) -> Any:
    """What the handler takes: the first message, or all of them, of which the first is there."""
    first = await anext(messages, None)
    if handler.request_streaming:
        return _chained(first, messages)
    if first is None:
        raise CallEndedError(WireError("the call ended before its request"))
    return first


async def _chained(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    if first is not None:
        yield first
        async for message in rest:
            yield message


def _begun(handler: Any, request: Any, context: Context) -> Any:
    """The handler's own answer: something to await, or an asynchronous generator."""
    kinds = {
        (False, False): handler.unary_unary,
        (False, True): handler.unary_stream,
        (True, False): handler.stream_unary,
        (True, True): handler.stream_stream,
    }
    return kinds[handler.request_streaming, handler.response_streaming](request, context)
