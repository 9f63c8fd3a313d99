"""The federation server as a process."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter

from sfl.fed_server.coordinator import Federation
from sfl.fed_server.service import FederationService
from sfl.fed_server.status import StatusBoard
from sfl.fed_server.versions import VersionStore
from sfl.identity.node import Node
from sfl.settings import FedSettings
from sfl.telemetry import log, peak_rss_mb
from sfl.v1.federation_pb2_grpc import add_FederationServicer_to_server
from sfl.watching.health import Health
from sfl.watching.watch import Watch
from sfl.wire.channel import serve, stop
from sfl.wire.own import guard_of, node_of

_TICK_S = 1.0
_DRAIN_S = 8.0  # for calls under way when the server stops; container engines kill 10 s after they have told


def run(settings: FedSettings) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is under way: a version in the making, and calls for `_DRAIN_S` at most.

    Raises `SettingsError` for an address that cannot be bound or labels that cannot be, `AdapterError` when the versions to
    resume from are damaged or updates cannot be kept in `out`, `StateError` when what is there is damaged, in use or another
    federation's."""
    node = node_of(settings, "fed")
    with Watch(settings) as watch:
        asyncio.run(_serve(settings, node, watch))


async def _serve(settings: FedSettings, node: Node | None, watch: Watch) -> None:
    metrics = watch.metrics
    store = VersionStore(settings.adapters or settings.out / "adapters")
    federation = Federation(settings, store, metrics, out=settings.out)
    board = StatusBoard(federation, settings.name, watch.process)
    metrics.listen(board.hear)
    service = FederationService(federation, limits=settings.limits, board=board)
    watch.traffic("members", service.traffic)
    _show(watch, federation, board)
    guard = guard_of(settings, node, federation.serves)
    watch.refusals(lambda: guard.refused)
    server, address = serve(settings.listen, node, guard, settings.limits.connections)
    add_FederationServicer_to_server(service, server)
    health = Health(server)
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    await health.serving("", "sfl.v1.Federation")
    await server.start()
    watch.ready()
    log.info("federation server %s listens on %s", settings.name, address)
    ticking = _Ticking(federation)
    try:
        while not told.is_set():
            ticking.tick()
            await _wait(told, _TICK_S)
    finally:
        await health.stopping()
        service.end_watches()
        await stop(server, _DRAIN_S)
        federation.close()
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


class _Ticking:
    """What the machine refuses now, it may not refuse at the next tick; said once, as long as it is the same."""

    def __init__(self, federation: Federation) -> None:
        self._federation = federation
        self._told = ""

    def tick(self) -> None:
        try:
            self._federation.tick()
        except OSError as error:
            if str(error) != self._told:
                log.error("%s; it is tried again every second", error)
            log.debug("where that was refused", exc_info=True)
            self._told = str(error)
        else:
            self._told = ""


def _show(watch: Watch, federation: Federation, board: StatusBoard) -> None:
    """Figures that are read when somebody asks."""

    def members() -> dict[tuple[str, ...], float]:
        return {key: float(count) for key, count in Counter((m.member.role, m.state) for m in board.presences()).items()}

    watch.read("sfl_version", "newest global version", lambda: federation.version)
    watch.read("sfl_pool_updates", "devices whose updates wait in the pool", lambda: float(len(federation.pooled())))
    watch.read("sfl_members", "members, by role and by whether they are there", members, ("role", "state"))
    watch.read(
        "sfl_last_step_age_seconds",
        "seconds since a device's last step, as it reports it",
        lambda: {(device,): age for device, age in board.ages().items()},
        ("device",),
    )
    text = "1 for a member that is behind the others, silent or away"
    watch.read("sfl_behind", text, lambda: {(name,): 1.0 for name in board.slow()}, ("member",))


async def _wait(event: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        return
