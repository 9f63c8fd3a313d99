"""Devices that come before the edge's half is loaded: they hear heartbeats, and are then served on the same stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from sfl.edge_server.gate import Gate
from sfl.v1.split_pb2 import Close, Closed, DeviceMessage, EdgeMessage
from sfl.v1.split_pb2_grpc import SplitTrainingServicer, SplitTrainingStub, add_SplitTrainingServicer_to_server
from sfl.wire.channel import serve


class Echo(SplitTrainingServicer):
    """Answers each message, and notes when a stream has ended."""

    def __init__(self) -> None:
        self.ended = asyncio.Event()

    async def Train(self, requests: AsyncIterator[DeviceMessage], context: Any) -> AsyncIterator[EdgeMessage]:
        try:
            async for _ in requests:
                yield EdgeMessage(closed=Closed())
        finally:
            self.ended.set()


def test_a_stream_waits_for_the_service_and_then_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfl.edge_server.gate.HEARTBEAT_S", 0.05)

    async def play() -> list[str | None]:
        gate, echo = Gate(), Echo()
        server, address = serve("127.0.0.1:0")
        add_SplitTrainingServicer_to_server(gate, server)
        await server.start()
        async with grpc.aio.insecure_channel(address) as channel:
            call = SplitTrainingStub(channel).Train()
            await call.write(DeviceMessage(close=Close()))
            kinds = [(await call.read()).WhichOneof("body") for _ in range(3)]
            gate.open(echo)
            while kinds[-1] == "heartbeat":
                kinds.append((await call.read()).WhichOneof("body"))
            await call.write(DeviceMessage(close=Close()))
            kinds.append((await call.read()).WhichOneof("body"))
            call.cancel()
            await asyncio.wait_for(echo.ended.wait(), 5)
        await server.stop(0)
        return kinds

    kinds = asyncio.run(asyncio.wait_for(play(), 20))
    assert kinds[:3] == ["heartbeat"] * 3 and kinds[-2:] == ["closed"] * 2
