"""The edge server as a process: from its settings to a served base, until it is told to stop."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState
from sfl.cache.cache import HalfCache, default_folder
from sfl.edge_server.engine import EdgeEngine
from sfl.edge_server.gate import Gate
from sfl.edge_server.load import load_half
from sfl.edge_server.packing import packable, packer
from sfl.edge_server.provisioning import ProvisioningService
from sfl.edge_server.service import SplitService
from sfl.edge_server.session_files import SessionFiles
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ORDERS, ComputeWorker
from sfl.errors import UnreachableError
from sfl.identity.node import Node
from sfl.model.cut import EdgeHalf
from sfl.model.fingerprint import model_fingerprint
from sfl.model.load import load_config
from sfl.model.lora import resolve_targets
from sfl.model.source import model_source
from sfl.settings import EdgeSettings
from sfl.telemetry import MetricsWriter, log, peak_rss_mb
from sfl.v1 import federation_pb2
from sfl.v1.provision_pb2_grpc import add_ProvisioningServicer_to_server
from sfl.v1.split_pb2_grpc import add_SplitTrainingServicer_to_server
from sfl.watching.health import Health
from sfl.watching.watch import Watch
from sfl.wire.adapters import lora_to_wire
from sfl.wire.channel import check_listen, serve, stop
from sfl.wire.federation import FederationClient
from sfl.wire.own import guard_of, node_of
from sfl.wire.provision import Description

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Result = TypeVar("Result")

_GRACE_S = 2.0  # for open streams when the server stops
_AGAIN_S = 1.0  # after which version 0 is proposed again


def run(settings: EdgeSettings) -> None:
    """Serve devices until SIGTERM or SIGINT. Raises the `SflError` that keeps the edge from serving.

    Until the federation has been joined everything happens here, in the main thread, where a signal ends any waiting at once.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    node = node_of(settings, "edge")
    check_listen(settings.listen)
    config = load_config(settings.model)
    lora = resolve_targets(config, settings.lora.spec())
    fingerprint = model_fingerprint(settings.model)
    federation = FederationClient(settings.federation, settings.name, settings.wait_s, settings.give_up_s, node=node)
    try:
        federation.join(_join_request(settings, lora, fingerprint))
        worker = ComputeWorker(ORDERS[settings.order])
        try:
            described = description_of(settings, config, lora, fingerprint)
            asyncio.run(_run(settings, node, described, federation, worker))
        finally:
            worker.stop()
    finally:
        federation.close()


async def _run(
    settings: EdgeSettings, node: Node | None, described: Description, federation: FederationClient, worker: ComputeWorker
) -> None:
    """From the first moment on devices are given what they lack, as they need it to join; they train once all have agreed."""
    told = _stop_signals()
    guard = guard_of(settings, node)
    server, address = serve(settings.listen, node, guard, settings.limits.connections)
    gate = Gate()
    add_SplitTrainingServicer_to_server(gate, server)
    health = Health(server)
    with Watch(settings) as watch:
        metrics = watch.metrics
        watch.report_to(federation, settings.report_s)
        watch.traffic("federation", federation.traffic)
        watch.refusals(lambda: guard.refused)
        provisioning = _provisioning(settings, described, metrics)
        if settings.provide:
            add_ProvisioningServicer_to_server(provisioning, server)
        await health.serving("", "sfl.v1.Provisioning")
        await health.starting("sfl.v1.SplitTraining")
        await server.start()
        watch.ready()
        log.info("edge server %s listens on %s", settings.name, address)
        service: SplitService | None = None

        def end() -> None:
            log.info("edge server %s has stopped", settings.name)
            if service is not None:
                metrics.write(
                    "end",
                    steps=service.steps,
                    bytes_received=service.traffic.received + federation.traffic.received,
                    bytes_sent=service.traffic.sent + federation.traffic.sent,
                    bytes_provided=provisioning.bytes_sent,
                    peak_rss_mb=round(peak_rss_mb(), 1),
                )

        async with AsyncExitStack() as closing:  # from the last to the first, each though another raises
            closing.callback(end)
            closing.callback(federation.close)  # or the loop would wait for calls that are still tried again
            # Nobody is served any more, so it may hold up the loop; a thread of the loop's might not be free before the close.
            closing.push(lambda kind, error, trace: watch.last_report(error))
            closing.push_async_callback(stop, server, _GRACE_S)
            closing.push_async_callback(provisioning.close)
            closing.push_async_callback(health.stopping)
            agreement = await _unless(told, asyncio.to_thread(federation.agreement, settings.join_wait_s))
            if agreement is None:
                log.info("edge server %s was told to stop before all members had agreed", settings.name)
                return
            watch.says("loading its half of the model")
            # On the worker's thread, which is the only one that computes: see SplitService.
            loaded = worker.submit(settings.lowest_cut, partial(load_half, settings, described.lora, list(agreement.labels)))
            half, slots, initial = await asyncio.wrap_future(loaded)
            engine = EdgeEngine(half, slots, settings.task, described.lora, described.fingerprint)
            versions = EdgeVersions(federation, settings.lowest_cut)
            service = SplitService(
                engine,
                worker,
                versions,
                federation,
                metrics,
                settings.give_up_s,
                SessionFiles(settings.out / "sessions", lambda: federation.federation),
                name=settings.name,
                limits=settings.limits,
            )
            closing.callback(service.stop)
            service.send_kept()
            for chore in (service.sweep_hourly(settings.session_keep_s), service.send_again()):
                closing.callback(asyncio.create_task(chore).cancel)
            watch.traffic("devices", service.traffic)
            gate.open(service)
            watch.says("serving no device")  # yet, or any more
            await health.serving("sfl.v1.SplitTraining")
            loop = asyncio.get_running_loop()
            federation.on_new_federation = partial(loop.call_soon_threadsafe, service.begin_anew)
            await _unless(told, keep_version_0(federation, agreement, _proposal(settings, half), initial))


def description_of(settings: EdgeSettings, config: PretrainedConfig, lora: LoraSpec, fingerprint: str) -> Description:
    """What devices are told, and given halves of."""
    return Description(
        edge=settings.name,
        base_model=settings.model,
        fingerprint=fingerprint,
        task=settings.task,
        lora=lora,
        lowest_cut=settings.lowest_cut,
        num_layers=config.num_hidden_layers,
        precisions=packable(),
        config=json.loads(config.to_json_string()),
        source=model_source(settings.model, fingerprint),
    )


def _provisioning(settings: EdgeSettings, described: Description, metrics: MetricsWriter) -> ProvisioningService:
    cache = HalfCache(settings.cache or default_folder("edge"), settings.cache_limit_mb)
    return ProvisioningService(described, cache, packer(settings.model), metrics)


def _join_request(settings: EdgeSettings, lora: LoraSpec, fingerprint: str) -> federation_pb2.JoinRequest:
    return federation_pb2.JoinRequest(
        name=settings.name,
        role=federation_pb2.EDGE,
        task=settings.task,
        base_model=settings.model,
        model_fingerprint=fingerprint,
        lora=lora_to_wire(lora),
        cut=settings.lowest_cut,
    )


async def keep_version_0(
    federation: FederationClient,
    agreement: federation_pb2.Agreement,
    header: federation_pb2.ProposalHeader,
    initial: AdapterState,
) -> None:
    """Offer version 0 whenever there is none: at the beginning, and to a federation server that lost its folder.

    Ends by the `SflError` for which this edge server cannot serve the federation any more.
    """
    while True:
        await asyncio.to_thread(federation.until_wanted, agreement)
        try:
            accepted = await asyncio.to_thread(federation.propose, header, initial)
        except UnreachableError as error:
            log.warning("version 0 could not be proposed, and will be again while it is wanted: %s", error)
            await asyncio.sleep(_AGAIN_S)
            continue
        log.info("version 0 is %s", "this edge server's" if accepted else "another edge server's")


def _proposal(settings: EdgeSettings, half: EdgeHalf) -> federation_pb2.ProposalHeader:
    return federation_pb2.ProposalHeader(
        edge=settings.name,
        blocks=half.family.blocks,
        head=half.family.head if settings.task == "classification" else (),
        num_layers=half.config.num_hidden_layers,
    )


def _stop_signals() -> asyncio.Event:
    """Set by SIGTERM and SIGINT, which no longer end the process by themselves."""
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told.set)
    return told


async def _unless(told: asyncio.Event, work: Coroutine[Any, Any, Result]) -> Result | None:
    """What `work` returns or raises; None if it is `told` first."""
    working, telling = asyncio.create_task(work), asyncio.create_task(told.wait())
    await asyncio.wait({working, telling}, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    if working.done():
        return working.result()
    working.cancel()  # a thread that it waits for ends with the connection
    return None
