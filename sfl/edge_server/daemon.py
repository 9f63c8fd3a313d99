"""The edge server as a process: from its settings to a served base, until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from functools import partial
from typing import Any

import torch

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState
from sfl.edge_server.engine import EdgeEngine
from sfl.edge_server.service import SplitService
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ORDERS, ComputeWorker
from sfl.model.cut import EdgeHalf
from sfl.model.fingerprint import model_fingerprint
from sfl.model.halves import load_edge_half
from sfl.model.load import load_config
from sfl.model.lora import AdapterSlots, head_state, initial_adapter, inject_lora, resolve_targets
from sfl.settings import EdgeSettings
from sfl.telemetry import MetricsWriter, log, peak_rss_mb
from sfl.v1 import federation_pb2
from sfl.v1.split_pb2_grpc import add_SplitTrainingServicer_to_server
from sfl.wire.adapters import lora_to_wire
from sfl.wire.channel import check_listen, serve, stop
from sfl.wire.federation import FederationClient

_GRACE_S = 2.0  # for open streams when the server stops


def run(settings: EdgeSettings) -> None:
    """Serve devices until SIGTERM or SIGINT. Raises the `SflError` that keeps the edge from serving.

    Until all members have agreed everything happens here, in the main thread, where a signal ends any waiting at once.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    check_listen(settings.listen)
    lora = resolve_targets(load_config(settings.model), settings.lora.spec())
    fingerprint = model_fingerprint(settings.model)
    federation = FederationClient(settings.federation, settings.name, settings.wait_s, settings.give_up_s)
    try:
        federation.join(_join_request(settings, lora, fingerprint))
        agreement = federation.agreement(settings.join_wait_s)
        worker = ComputeWorker(ORDERS[settings.order])
        try:
            asyncio.run(_run(settings, lora, fingerprint, list(agreement.labels), federation, worker))
        finally:
            worker.stop()
    finally:
        federation.close()


async def _run(
    settings: EdgeSettings,
    lora: LoraSpec,
    fingerprint: str,
    labels: list[str],
    federation: FederationClient,
    worker: ComputeWorker,
) -> None:
    told = _stop_signals()
    server, address = serve(settings.listen)
    # On the worker's thread, which is the only one that computes: see SplitService.
    loaded = worker.submit(settings.lowest_cut, partial(_load, settings, lora, labels))
    half, slots, initial = await asyncio.wrap_future(loaded)
    engine = EdgeEngine(half, slots, settings.task, lora, fingerprint)
    with MetricsWriter(settings.out / "metrics.jsonl") as metrics:
        service = SplitService(
            engine, worker, EdgeVersions(federation, settings.lowest_cut), federation, metrics, settings.give_up_s
        )
        add_SplitTrainingServicer_to_server(service, server)
        await server.start()
        log.info("edge server %s listens on %s", settings.name, address)
        try:
            await _unless(told, asyncio.to_thread(_propose, federation, _proposal(settings, half), initial))
            await told.wait()
        finally:
            await stop(server, _GRACE_S)
            federation.close()  # or the loop would wait for calls that are still tried again
            log.info("edge server %s has stopped", settings.name)
            metrics.write(
                "end",
                steps=service.steps,
                bytes_received=service.traffic.received + federation.traffic.received,
                bytes_sent=service.traffic.sent + federation.traffic.sent,
                peak_rss_mb=round(peak_rss_mb(), 1),
            )


def _load(settings: EdgeSettings, lora: LoraSpec, labels: list[str]) -> tuple[EdgeHalf, AdapterSlots, AdapterState]:
    """The edge's half of the base, where its adapters go, and version 0 as this edge would begin."""
    half = load_edge_half(settings.model, settings.task, settings.lowest_cut, labels, settings.precision, seed=settings.seed)
    initial = initial_adapter(half.config, settings.task, lora, head_state(half), settings.seed)
    return half, inject_lora(half, lora), initial


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


def _propose(federation: FederationClient, header: federation_pb2.ProposalHeader, initial: AdapterState) -> None:
    if not federation.propose(header, initial):
        log.info("version 0 is another edge server's, or there are versions already")


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


async def _unless(told: asyncio.Event, work: Coroutine[Any, Any, object]) -> None:
    """Wait for `work`, whose error is raised, but no longer than until `told`."""
    working, telling = asyncio.create_task(work), asyncio.create_task(told.wait())
    await asyncio.wait({working, telling}, return_when=asyncio.FIRST_COMPLETED)
    telling.cancel()
    if working.done():
        working.result()
