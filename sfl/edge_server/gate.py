"""Devices may knock before the edge's half of the model is loaded; they are let in when it is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import grpc.aio

from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage, Heartbeat
from sfl.v1.split_pb2_grpc import SplitTrainingServicer
from sfl.wire.channel import HEARTBEAT_S


class Gate(SplitTrainingServicer):
    """Stands for a service that does not exist yet: a stream hears heartbeats until `open`, and has the service then."""

    def __init__(self) -> None:
        self._service: asyncio.Future[SplitTrainingServicer] = asyncio.get_running_loop().create_future()

    def open(self, service: SplitTrainingServicer) -> None:
        self._service.set_result(service)

    async def Train(
        self, requests: AsyncIterator[DeviceMessage], context: grpc.aio.ServicerContext[DeviceMessage, EdgeMessage]
    ) -> AsyncIterator[EdgeMessage]:
        while not (await asyncio.wait({self._service}, timeout=HEARTBEAT_S))[0]:
            yield EdgeMessage(heartbeat=Heartbeat())
        async with contextlib.aclosing(self._service.result().Train(requests, context)) as messages:
            async for message in messages:
                yield message
