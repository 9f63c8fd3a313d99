"""The federation server as a process."""

from __future__ import annotations

import asyncio
import signal

from sfl.fed_server.coordinator import Federation
from sfl.fed_server.service import FederationService
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter, log, peak_rss_mb
from sfl.v1.federation_pb2_grpc import add_FederationServicer_to_server
from sfl.wire.channel import serve, stop

_TICK_S = 1.0
_GRACE_S = 2.0  # for calls under way when the server stops


def run(settings: FedSettings) -> None:
    """Serve until SIGTERM or SIGINT. Raises `SettingsError` for an address that cannot be bound or labels that cannot be,
    `AdapterError` when the versions to resume from are damaged or updates cannot be kept in `out`."""
    with MetricsWriter(settings.out / "metrics.jsonl") as metrics:
        asyncio.run(_serve(settings, metrics))


async def _serve(settings: FedSettings, metrics: MetricsWriter) -> None:
    store = VersionStore(settings.adapters or settings.out / "adapters")
    federation = Federation(settings, store, metrics, pool=settings.out / "pool")
    service = FederationService(federation)
    server, address = serve(settings.listen)
    add_FederationServicer_to_server(service, server)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await server.start()
    log.info("federation server %s listens on %s", settings.name, address)
    try:
        while not told.is_set():
            federation.tick()
            await _wait(told, _TICK_S)
    finally:
        await stop(server, _GRACE_S)
        metrics.write(
            "end",
            version=federation.version,
            aggregations=federation.aggregations,
            submissions=federation.submissions,
            refused=federation.refused,
            **({"epsilon": max(epsilons.values())} if (epsilons := federation.epsilons()) else {}),
            bytes_received=service.traffic.received,
            bytes_sent=service.traffic.sent,
            peak_rss_mb=round(peak_rss_mb(), 1),
        )
        log.info("federation server %s has stopped", settings.name)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        return
