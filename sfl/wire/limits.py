"""What one node may take of a server at a time."""

from __future__ import annotations

import asyncio
from typing import Any

from sfl.connection_settings import LimitSettings
from sfl.errors import BusyError, LimitError


class Allowance:
    """Open calls and bytes of unfinished requests of one node. For one event loop."""

    def __init__(self, limits: LimitSettings, who: str) -> None:
        self.calls = 0
        self._limits = limits
        self._who = who
        self._bytes = 0
        self._waiting: list[asyncio.Future[None]] = []

    def begin_call(self) -> None:
        """Raises `BusyError` when the node has as many calls open as it may."""
        if self.calls >= self._limits.streams:
            raise BusyError(
                f"{self._who} has {self.calls} calls open, as many as limits.streams allows: close some, or raise it there"
            )
        self.calls += 1

    def end_call(self) -> None:
        self.calls -= 1

    async def take(self, size: int) -> None:
        """Wait until `size` more bytes are allowed. Raises `LimitError` for more than there can be, `BusyError` when it takes too
        long."""
        most = round(self._limits.in_flight_mb * 1e6)
        if size > most:
            raise LimitError(f"{self._who} announces a request of {size} bytes, above limits.in_flight_mb ({most} bytes)")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.stalled_s
        while self._bytes + size > most:
            turn: asyncio.Future[None] = loop.create_future()
            self._waiting.append(turn)
            await asyncio.wait({turn}, timeout=deadline - loop.time())
            if not turn.done():
                self._waiting.remove(turn)
                raise BusyError(
                    f"{self._who} has {self._bytes} bytes in unfinished requests: {size} more are above limits.in_flight_mb"
                    f" ({most} bytes), and for {self._limits.stalled_s:g} s none were finished"
                )
        self._bytes += size

    def give_back(self, size: int) -> None:
        self._bytes -= size
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)


class Inflow:
    """The message that comes in on one stream, as `Allowance` counts it: from its header until the next one is asked for."""

    def __init__(self, allowance: Allowance) -> None:
        self._allowance = allowance
        self._taken = 0
        self._due = 0

    @property
    def incomplete(self) -> bool:
        """Whether bytes of a message that has begun are still due."""
        return self._due > 0

    async def feed(self, message: Any) -> None:
        """Count a message, or a piece of one. Raises as `Allowance.take` does."""
        if is_chunk(message):
            self._due -= len(message.chunk)
            return
        size = sum(header.byte_length for header in getattr(message, "tensors", ()))
        await self._allowance.take(size)
        self._taken += size
        self._due = size

    def asked_for_more(self) -> None:
        """Whoever has the messages is done with those that were complete."""
        if not self.incomplete:
            self.end()

    def end(self) -> None:
        self._allowance.give_back(self._taken)
        self._taken = 0


def is_chunk(message: Any) -> bool:
    """Whether a message is a piece of the tensors of the one before it."""
    return "chunk" in message.DESCRIPTOR.fields_by_name and message.WhichOneof("body") == "chunk"
