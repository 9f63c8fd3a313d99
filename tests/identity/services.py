"""The real services of both servers behind TLS and the guard, and streams whose messages come when a test says so."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sfl.cache.cache import HalfCache
from sfl.connection_settings import LimitSettings
from sfl.device.edge_link import GrpcEdgeLink
from sfl.edge_server.provisioning import ProvisioningService
from sfl.edge_server.service import SplitService
from sfl.edge_server.session_files import SessionFiles
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ComputeWorker, arrival
from sfl.errors import ModelError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.service import FederationService
from sfl.identity.node import Node
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2_grpc import add_FederationServicer_to_server
from sfl.v1.provision_pb2_grpc import add_ProvisioningServicer_to_server
from sfl.v1.split_pb2_grpc import add_SplitTrainingServicer_to_server
from sfl.watching.health import Health
from sfl.wire.federation import FederationClient
from sfl.wire.guard import Guard
from tests.edge_server.made import Halves, RecordingFederation
from tests.fed_server.made import federation
from tests.identity.made import Certificates, behind
from tests.provision.made import DESCRIPTION


@contextmanager
def federation_server(
    folder: Path, certificates: Certificates | None, limits: LimitSettings | None = None, devices: int = 2
) -> Iterator[tuple[str, Federation, Guard]]:
    """Without certificates in plaintext, under the limits alone."""
    fed = federation(folder, devices, labels=("benign", "scan"))
    guard = Guard(limits or LimitSettings()) if certificates is None else certificates.guard("fed", limits, fed.serves)
    node = certificates and certificates.node("fed")
    service = FederationService(fed, limits=limits)
    with behind(guard, node, lambda server: add_FederationServicer_to_server(service, server), Health) as address:
        yield address, fed, guard


@contextmanager
def edge_server(
    folder: Path, certificates: Certificates | None, limits: LimitSettings | None = None, kept: bool = False
) -> Iterator[tuple[str, Halves, Guard]]:
    """Training and provisioning, without certificates as `federation_server`; sessions are in files if they are to be `kept`."""
    halves, worker, metrics = Halves(), ComputeWorker(arrival), MetricsWriter(None)
    above = cast(FederationClient, RecordingFederation(halves.initial))
    guard = Guard(limits or LimitSettings()) if certificates is None else certificates.guard("edge-1", limits)

    files = SessionFiles(folder / "sessions") if kept else None

    async def never(*arguments: Any) -> None:
        raise ModelError("nothing is packed here")

    def add(server: Any) -> None:
        versions = EdgeVersions(above, 1)
        split = SplitService(halves.engine, worker, versions, above, metrics, 30.0, files, name="edge-1", limits=limits)
        add_SplitTrainingServicer_to_server(split, server)
        provisioning = ProvisioningService(DESCRIPTION, HalfCache(folder / "cache", 100.0), never, metrics)
        add_ProvisioningServicer_to_server(provisioning, server)

    try:
        with behind(guard, certificates and certificates.node("edge-1"), add, Health) as address:
            yield address, halves, guard
    finally:
        worker.stop()


def linked(
    address: str,
    request: Any,
    node: Node | None = None,
    on_edge: Callable[[str], None] = lambda edge: None,
    give_up_s: float = 5,
) -> GrpcEdgeLink:
    """A device's link, with its session open."""
    link = GrpcEdgeLink(address, request, 5, give_up_s, node, on_edge)
    try:
        link.begin()
    except BaseException:
        link.hang_up()
        raise
    return link


class Requests:
    """The messages of a stream: those that were `put`; it stays open until `close`."""

    def __init__(self, *messages: Any) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for message in messages:
            self.put(message)

    def put(self, message: Any) -> None:
        self._messages.put(message)

    def close(self) -> None:
        self._messages.put(None)

    def __iter__(self) -> Requests:
        return self

    def __next__(self) -> Any:
        message = self._messages.get()
        if message is None:
            raise StopIteration
        return message
