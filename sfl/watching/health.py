"""gRPC's health protocol: daemons answer it, `sfl health` asks it."""

from __future__ import annotations

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio  # type: ignore[attr-defined]  # it is there

from sfl.errors import RefusedError, SflError
from sfl.wire.channel import error_from

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Health:
    """What a server says of its services; the empty name is the server as a whole, which serves as soon as it listens."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._servicer = aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)

    async def serving(self, *services: str) -> None:
        """These services answer from now on."""
        for service in services:
            await self._servicer.set(service, SERVING)

    async def starting(self, *services: str) -> None:
        """These services are there and will answer."""
        for service in services:
            await self._servicer.set(service, NOT_SERVING)

    async def stopping(self) -> None:
        """None answers any more."""
        await self._servicer.enter_graceful_shutdown()


def require_serving(channel: grpc.Channel, peer: str, service: str, timeout_s: float) -> None:
    """Raise `RefusedError` unless `service` serves, `UnreachableError` when nobody answers in time."""
    stub = health_pb2_grpc.HealthStub(channel)
    try:
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.NOT_FOUND:
            raise RefusedError(f"{peer} has no service '{service}'") from error
        raise _meaning(error, peer) from error
    if reply.status != SERVING:
        raise RefusedError(f"{peer} does not serve {service or 'yet'}: {_name(reply.status)}")


def _meaning(error: grpc.RpcError, peer: str) -> SflError:
    return error_from(error, peer)


def _name(status: int) -> str:
    name: str = health_pb2.HealthCheckResponse.ServingStatus.Name(status)
    return name
