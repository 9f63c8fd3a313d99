"""The one place that dials and serves.

Keepalive: a client pings every 30 s, also when no call is open, so that a NAT box on the way keeps the connection. The server
allows pings down to 10 s apart, so that none is ever "too many". A peer that does not answer a ping in 20 s is gone, one that
is merely slow is not. A connection without a call is ended by the server after a minute, and made again with the next call.

With a node's certificate a connection is TLS, and both ends show who they are; without one it is plaintext.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio

from sfl.errors import ListenError, RefusedError, UnreachableError
from sfl.identity.identity import Role
from sfl.identity.node import Node
from sfl.telemetry import log
from sfl.wire.address import check_address
from sfl.wire.descriptors import connections_within
from sfl.wire.refusals import number_of
from sfl.wire.renewed import RenewedChannel
from sfl.wire.tls import check_peer, client_credentials, require_plaintext, server_credentials

HEARTBEAT_S = 10.0  # between two heartbeats on a stream that has nothing else to say
SILENCE_S = 60.0  # a stream without even a heartbeat for so long is broken
IDLE_S = 60.0  # a connection without a call for so long is ended, as it holds one of the server's places
# gRPC's thread that watches a channel looks every 0.2 s whether anybody still wants to know; one that finds the channel closed
# before leaves a traceback on standard error.
_WATCHED_S = 0.25

_CLIENT_OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_reconnect_backoff_ms", 5_000),
)
_SERVER_OPTIONS = (
    ("grpc.so_reuseport", 0),  # or a second daemon on the same port would start and get half of the calls
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.server_handshake_timeout_ms", 20_000),  # a connection on which no TLS begins is no connection
    ("grpc.max_concurrent_streams", 512),  # of one connection; a client with more calls waits
)
_REFUSALS = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.UNKNOWN,  # an exception in the peer's handler; INTERNAL comes from a proxy or a broken connection
}

Result = TypeVar("Result")


def dial(address: str, peer: str, wait_s: float, node: Node | None = None, role: Role | None = None) -> grpc.Channel:
    """A channel to `peer` ("the edge server", for messages) at `address`, connected.

    With `node` over TLS, and the server must have a certificate for `role`. Raises `SettingsError` for an address that is none,
    `PeerIdentityError` when the server is not the one that should be there or does not accept this node, and
    `UnreachableError` after `wait_s` seconds without an answer.
    """
    check_address(address)
    channel: grpc.Channel
    if node is None:
        channel = grpc.insecure_channel(address, options=_CLIENT_OPTIONS)
    else:
        channel = RenewedChannel(
            node, lambda shown: grpc.secure_channel(address, client_credentials(shown), options=_CLIENT_OPTIONS)
        )
    ready = grpc.channel_ready_future(channel)
    try:
        _wait_until_ready(ready, address, peer, wait_s, node, role)
    except BaseException:
        if ready.cancel():
            time.sleep(_WATCHED_S)
        channel.close()
        raise
    return channel


def _wait_until_ready(ready: Any, address: str, peer: str, wait_s: float, node: Node | None, role: Role | None) -> None:
    started, pace = time.monotonic(), 1.0
    while True:
        if node is not None:
            check_peer(address, peer, node, role, min(pace, wait_s))
        left = wait_s - (time.monotonic() - started)
        try:
            ready.result(timeout=max(0.0, min(pace, left)))
            return
        except grpc.FutureTimeoutError:
            if node is None:
                require_plaintext(address, peer, min(pace, wait_s))
        if left <= pace:
            raise UnreachableError(
                f"{peer} at {address} did not answer within {wait_s:g} s: is it running, and is the address right?"
            )
        log.info("waiting for %s at %s (%.0f of %.0f s)", peer, address, time.monotonic() - started, wait_s)
        pace = 5.0


def serve(
    address: str, node: Node | None = None, guard: grpc.aio.ServerInterceptor[Any, Any] | None = None, connections: int = 4096
) -> tuple[grpc.aio.Server, str]:
    """A server bound to `address`, not yet started, and the address with the port it got (for port 0).

    With `node` over TLS: whoever has no certificate of the same authority gets no further than the handshake. `guard` stands
    before all services; at most so many `connections` are taken at a time, and no more than leave this process files to open.
    Raises `SettingsError` when the address is none or cannot be bound.
    """
    host, port = check_address(address)
    options = (
        *_SERVER_OPTIONS,
        ("grpc.max_connection_idle_ms", round(IDLE_S * 1e3)),
        ("grpc.max_allowed_incoming_connections", connections_within(connections)),
    )
    server = grpc.aio.server(options=options, interceptors=None if guard is None else [guard])
    try:
        bound = server.add_insecure_port(address) if node is None else server.add_secure_port(address, server_credentials(node))
    except RuntimeError as error:
        raise _cannot_listen(address, _bind_error(host, port) or "gRPC could not bind it") from error
    return server, f"{host}:{bound}"


def check_listen(address: str) -> None:
    """Raise the `SettingsError` that `serve` would, before anything slow is begun."""
    if (reason := _bind_error(*check_address(address))) is not None:
        raise _cannot_listen(address, reason)


def _cannot_listen(address: str, reason: str) -> ListenError:
    return ListenError(f"cannot listen on {address}: {reason}; choose another with `listen`")


async def stop(server: grpc.aio.Server, grace_s: float) -> None:
    """Stop `server`: calls that are open after `grace_s` seconds are cut off, and have as long again to see to their end.

    Tasks of theirs that were left to the end of the event loop would be cancelled by it, which grpc reports with a traceback.
    """
    await server.stop(grace_s)
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=grace_s)


def _bind_error(host: str, port: int) -> str | None:
    """Why a plain socket cannot be bound there, which gRPC does not say; None if it can."""
    try:
        with socket.create_server((host.strip("[]"), port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            return None
    except OSError as error:
        return f"{error.strerror or error}"


def error_from(error: grpc.RpcError, peer: str) -> RefusedError | UnreachableError:
    """What a failed call means: `RefusedError` with the peer's reason, or `UnreachableError` when trying again may help; with the
    number that the peer gave."""
    code, details = error.code(), error.details()
    failure: RefusedError | UnreachableError
    if code in _REFUSALS:
        failure = RefusedError(f"{peer} refused: {details}")
    else:
        failure = UnreachableError(f"{peer} is out of reach ({code.name}: {details})")
    failure.number = number_of(error) or failure.number
    return failure


def gave_up(failure: UnreachableError, gone_s: float) -> UnreachableError:
    """`failure` once more, as nothing else came for `gone_s` seconds."""
    last = UnreachableError(f"{failure}; gave up after {gone_s:.0f} s")
    last.number = failure.number
    return last


def retry(
    call: Callable[[], Result],
    peer: str,
    give_up_s: float,
    sleep: Callable[[float], object] = time.sleep,
    stopping: Callable[[], bool] = lambda: False,
) -> Result:
    """Run `call`, which may raise `grpc.RpcError`, until it succeeds; each failure is logged, the pauses grow to 5 s.

    `sleep` makes the pauses, for those who may have to end one early; what fails while this process is `stopping` is given up.
    For calls that the peer answers alike however often they come. Raises `RefusedError` at once when the peer says no,
    `UnreachableError` when it stays away for `give_up_s` seconds from the first failure on: a call that takes long is none.
    """
    failed: float | None = None  # when the first try did
    pause = 0.2
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            failure = error_from(error, peer)
            if isinstance(failure, RefusedError):
                raise failure from error
            failed = time.monotonic() if failed is None else failed
            gone = time.monotonic() - failed
            if gone + pause > give_up_s or stopping():
                raise gave_up(failure, gone) from error
            log.warning("%s; trying again in %.1f s", failure, pause)
        sleep(pause * random.uniform(0.8, 1.2))
        if stopping():
            raise gave_up(failure, time.monotonic() - failed)
        pause = min(pause * 2, 5.0)


def until_silent(call: Any, peer: str, silence_s: float = SILENCE_S) -> Iterator[Any]:
    """The messages of a stream, which is cancelled when one is waited for longer than `silence_s`: a peer sends heartbeats far
    more often. How long the caller takes for a message does not count.

    Raises `grpc.RpcError` when the stream breaks and `UnreachableError` when it was cancelled.
    """
    deadline, ended = math.inf, threading.Event()

    def watch() -> None:
        while not ended.wait(min(silence_s, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                call.cancel()
                return

    threading.Thread(target=watch, name="watch-for-silence", daemon=True).start()
    try:
        while True:
            deadline = time.monotonic() + silence_s
            try:
                message = next(call, None)
            except grpc.RpcError:
                if time.monotonic() >= deadline:
                    raise UnreachableError(f"{peer} was silent for {silence_s:g} s") from None
                raise
            deadline = math.inf
            if message is None:
                return
            yield message
    finally:
        ended.set()
