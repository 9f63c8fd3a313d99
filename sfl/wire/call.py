"""One call behind the guard: its messages, each looked at before the service sees it, and its end before its time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from sfl.connection_settings import LimitSettings
from sfl.errors import BusyError, LimitError, RightsError, SflError, UnknownMemberError, WireError
from sfl.identity.peer import Peer
from sfl.identity.rights import Serves, refusal
from sfl.wire.limits import Allowance, Inflow, is_chunk

_MALFORMED = object()  # stands for a message that cannot be read
_CODES: dict[type[SflError], grpc.StatusCode] = {
    RightsError: grpc.StatusCode.PERMISSION_DENIED,
    LimitError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    BusyError: grpc.StatusCode.UNAVAILABLE,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownMemberError: grpc.StatusCode.UNAVAILABLE,
}


class CallEndedError(Exception):
    """A call that the guard ends. No `SflError` itself: services, which it passes through, must not answer it."""

    def __init__(self, error: SflError, code: grpc.StatusCode | None = None) -> None:
        super().__init__(str(error))
        self.error = error
        self.code = code or _CODES[type(error)]


class GuardedCall:
    """A call of `peer`, None without TLS. To be made in the task that answers the call, which `end` cancels."""

    def __init__(self, method: str, peer: Peer | None, limits: LimitSettings, allowance: Allowance, serves: Serves) -> None:
        self.peer = peer
        self.ended: CallEndedError | None = None
        self._method = method
        self._limits = limits
        self._serves = serves
        self._allowance = allowance
        self._inflow = Inflow(allowance)
        self._task = asyncio.current_task()
        self._deadline: asyncio.TimerHandle | None = None

    def end(self, ended: CallEndedError) -> None:
        """Have the task that answers the call cancelled."""
        if self.ended is None and self._task is not None:
            self.ended = ended
            self._task.cancel()

    def close(self) -> None:
        self._expect_nothing()
        self._inflow.end()

    async def messages(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """What the caller sends, as far as it may send it; see `require_allowed`. Raises `CallEndedError`."""
        limits, wait_s = self._limits, self._limits.opening_s
        what = f"nothing came in the first {wait_s:g} s of the call (limits.opening_s)"
        while True:
            self._inflow.asked_for_more()
            if what:
                self._expect(wait_s, what)
            message = await anext(requests, None)
            self._expect_nothing()
            if message is None:
                return
            try:
                self._require_allowed(message)
                await self._inflow.feed(message)
            except SflError as error:
                raise CallEndedError(error) from error
            yield message
            wait_s = limits.stalled_s
            what = f"a message stopped half-way for {wait_s:g} s (limits.stalled_s)" if self._inflow.incomplete else ""

    def _require_allowed(self, message: Any) -> None:
        if message is _MALFORMED:
            raise WireError(f"a message to {self._method} cannot be read")
        if self.peer is None or is_chunk(message):
            return
        if self.peer.identity is None:
            raise RightsError("this certificate was not made by `sfl certs`: it does not say whose it is")
        if (error := refusal(self._method, self.peer.identity, message, self._serves)) is not None:
            raise error

    def _expect(self, within_s: float, reason: str) -> None:
        ended = CallEndedError(LimitError(f"the call was ended: {reason}"), grpc.StatusCode.DEADLINE_EXCEEDED)
        self._deadline = asyncio.get_running_loop().call_later(within_s, self.end, ended)

    def _expect_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def lenient(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """A deserialiser that leaves it to `GuardedCall` to refuse what cannot be read; gRPC would log a traceback."""

    def reading(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return _MALFORMED

    return reading
