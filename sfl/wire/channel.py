"""The one place that dials and serves.

Keepalive: a client pings every 30 s, also when no call is open, so that a NAT box on the way keeps the connection; the
server allows pings down to 10 s apart, so that none is ever "too many". A peer that does not answer a ping in 20 s is
gone, one that is merely slow is not.
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

from sfl.errors import RefusedError, SettingsError, SflError, UnreachableError
from sfl.telemetry import log
from sfl.wire.address import check_address

HEARTBEAT_S = 10.0  # between two heartbeats on a stream that has nothing else to say
SILENCE_S = 60.0  # a stream without even a heartbeat for so long is broken

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


def dial(address: str, peer: str, wait_s: float) -> grpc.Channel:
    """A channel to `peer` ("the edge server", for messages) at `address`, connected.

    Raises `SettingsError` for an address that is none and `UnreachableError` after `wait_s` seconds without an answer.
    """
    check_address(address)
    channel = grpc.insecure_channel(address, options=_CLIENT_OPTIONS)  # credentials go here
    ready = grpc.channel_ready_future(channel)
    started = time.monotonic()
    while True:
        left = wait_s - (time.monotonic() - started)
        try:
            ready.result(timeout=max(0.0, min(5.0, left)))
            return channel
        except grpc.FutureTimeoutError:
            if left <= 5.0:
                ready.cancel()
                channel.close()
                raise UnreachableError(
                    f"{peer} at {address} did not answer within {wait_s:g} s: is it running, and is the address right?"
                ) from None
            log.info("waiting for %s at %s (%.0f of %.0f s)", peer, address, wait_s - left + 5.0, wait_s)


def serve(address: str) -> tuple[grpc.aio.Server, str]:
    """A server bound to `address`, not yet started, and the address with the port it got (for port 0).

    Raises `SettingsError` when the address is none or cannot be bound.
    """
    host, port = check_address(address)
    server = grpc.aio.server(options=_SERVER_OPTIONS)
    try:
        bound = server.add_insecure_port(address)  # credentials go here
    except RuntimeError as error:
        raise _cannot_listen(address, _bind_error(host, port) or "gRPC could not bind it") from error
    return server, f"{host}:{bound}"


def check_listen(address: str) -> None:
    """Raise the `SettingsError` that `serve` would, before anything slow is begun."""
    if (reason := _bind_error(*check_address(address))) is not None:
        raise _cannot_listen(address, reason)


def _cannot_listen(address: str, reason: str) -> SettingsError:
    return SettingsError(f"cannot listen on {address}: {reason}; choose another with `listen`")


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


def error_from(error: grpc.RpcError, peer: str) -> SflError:
    """What a failed call means: `RefusedError` with the peer's reason, or `UnreachableError` when trying again may help."""
    code, details = error.code(), error.details()
    if code in _REFUSALS:
        return RefusedError(f"{peer} refused: {details}")
    return UnreachableError(f"{peer} is out of reach ({code.name}: {details})")


def retry(call: Callable[[], Result], peer: str, give_up_s: float, sleep: Callable[[float], object] = time.sleep) -> Result:
    """Run `call`, which may raise `grpc.RpcError`, until it succeeds; each failure is logged, the pauses grow to 5 s.

    `sleep` makes the pauses, for those who may have to end one early.
    For calls that the peer answers alike however often they come. Raises `RefusedError` at once when the peer says no,
    `UnreachableError` when it stays away for `give_up_s` seconds.
    """
    started, pause = time.monotonic(), 0.2
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            failure = error_from(error, peer)
            if isinstance(failure, RefusedError):
                raise failure from error
            gone = time.monotonic() - started
            if gone + pause > give_up_s:
                raise UnreachableError(f"{failure}; gave up after {gone:.0f} s") from error
            log.warning("%s; trying again in %.1f s", failure, pause)
        sleep(pause * random.uniform(0.8, 1.2))
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
