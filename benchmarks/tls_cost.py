"""What mutual TLS and the guard before every service cost: a training step over TLS over one in plaintext, paired, in one run.

    python benchmarks/tls_cost.py [--pairs 20] [--threads 2] [--shape opt-350m]

One edge server, a process of its own, serves on two ports: over TLS behind the guard, and in plaintext without. Two devices,
whose halves are left out, send it the same activations in turns. Prints the median ratio with its quartiles, and the same for a
bare exchange, an evaluation of one token, in which little is computed.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch
from shapes import make_model

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState, edge_half
from sfl.connection_settings import LimitSettings
from sfl.device.edge_link import GrpcEdgeLink
from sfl.edge_server.engine import EdgeEngine
from sfl.edge_server.load import load_half
from sfl.edge_server.service import SplitService
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ComputeWorker, arrival
from sfl.identity.folder import CertificateFolder, Wanted
from sfl.identity.identity import Identity
from sfl.identity.node import Node, NodeFiles
from sfl.identity.revoked import Revocations
from sfl.model.load import load_config
from sfl.model.lora import resolve_targets
from sfl.settings import EdgeSettings
from sfl.telemetry import MetricsWriter
from sfl.v1.split_pb2_grpc import add_SplitTrainingServicer_to_server
from sfl.wire.channel import serve
from sfl.wire.federation import FederationClient
from sfl.wire.guard import Guard
from sfl.wire.split import CutBatch, OptimizerSpec, SessionRequest

LIMIT = 1.05
CUT, BATCH, TOKENS = 2, 4, 128
WARM_UP = 3


class NoFederation:
    """Version 0, from nowhere."""

    def __init__(self, initial: AdapterState) -> None:
        self._initial = initial

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0, rank: int | None = None) -> AdapterState:
        return edge_half(self._initial, first_layer)


def lora_of(model: str) -> LoraSpec:
    return resolve_targets(load_config(model), LoraSpec(8, 16.0, 0.0, ()))


def be_edge(model: str, certificates: Path, threads: int, parent: Connection) -> None:
    """Serve until the parent hangs up; tells it the two addresses."""
    torch.set_num_threads(threads)

    async def work() -> None:
        half, slots, initial = load_half(EdgeSettings(model=model, lowest_cut=CUT), lora_of(model), ["a", "b"])
        engine = EdgeEngine(half, slots, "classification", lora_of(model), "f" * 64)
        federation = cast(FederationClient, NoFederation(initial))
        worker = ComputeWorker(arrival)
        files = NodeFiles.within(certificates / "nodes" / "edge")
        guard = Guard(LimitSettings(), Revocations(files.revoked, files.ca))
        servers, addresses = [], []
        for node, before in ((None, None), (Node(files), guard)):
            server, address = serve("127.0.0.1:0", node, before)
            service = SplitService(engine, worker, EdgeVersions(federation, CUT), federation, MetricsWriter(None), 60.0)
            add_SplitTrainingServicer_to_server(service, server)
            await server.start()
            servers.append(server)  # or it would be stopped when nobody refers to it
            addresses.append(address)
        parent.send(addresses)
        await asyncio.to_thread(parent.poll, None)

    asyncio.run(work())


def in_turns(links: Sequence[GrpcEdgeLink], call: Callable[[GrpcEdgeLink], Any], last_first: bool) -> list[float]:
    """Seconds that it takes over each of the links. Who comes second finds warm caches: so they take turns in that, too."""
    seconds = {}
    for number in sorted(range(len(links)), reverse=last_first):
        started = time.perf_counter()
        call(links[number])
        seconds[number] = time.perf_counter() - started
    return [seconds[number] for number in range(len(links))]


def report(what: str, pairs: Sequence[Sequence[float]], limit: float | None = None) -> None:
    pairs = pairs[WARM_UP:]
    low, middle, high = statistics.quantiles([tls / plain for plain, tls in pairs], n=4)
    plain, tls = (1e3 * statistics.median(each) for each in zip(*pairs))
    verdict = "" if limit is None else f", limit {limit:.2f}: {'met' if middle <= limit else 'MISSED'}"
    ratio = f"ratio {middle:.3f} (quartiles {low:.3f} to {high:.3f}){verdict}"
    print(f"{what}: {plain:.1f} ms in plaintext, {tls:.1f} ms over TLS, {ratio}")


def measure(model: str, pairs: int, addresses: list[str], node: Node) -> None:
    hidden = load_config(model).hidden_size

    def batch(size: int, tokens: int) -> CutBatch:
        mask = torch.ones(size, tokens, dtype=torch.int64)
        return CutBatch(torch.randn(size, tokens, hidden), mask, torch.zeros(size, dtype=torch.int64))

    links = []
    for name, address, shown in zip(("plain", "tls"), addresses, (None, node)):
        request = SessionRequest(
            session=name,
            device=name,
            task="classification",
            cut=CUT,
            version=0,
            model_fingerprint="f" * 64,
            lora=lora_of(model),
            optimizer=OptimizerSpec("adamw", 1e-3),
            seed=0,
            dtype="fp32",
        )
        link = GrpcEdgeLink(address, request, 30, 30, shown)
        link.begin()
        links.append(link)
    steps, exchanges = [], []
    for number in range(1, pairs + WARM_UP + 1):
        sent = batch(BATCH, TOKENS)
        steps.append(in_turns(links, partial(GrpcEdgeLink.step, step=number, version=0, batch=sent), number % 2 == 0))
        sent = batch(1, 1)
        exchanges.append(in_turns(links, partial(GrpcEdgeLink.evaluate, version=0, batch=sent), number % 2 == 0))
    report(f"a step of {BATCH}x{TOKENS} at cut {CUT}, without the device's share", steps, LIMIT)
    report("an evaluation of one token", exchanges)
    for link in links:
        link.hang_up()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="opt-350m")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = str(make_model(args.shape, folder / "model"))
        wanted = [Wanted(Identity("edge", "edge"), ("127.0.0.1",)), Wanted(Identity("device", "tls"))]
        CertificateFolder.make(folder / "certs", wanted)
        spawned = multiprocessing.get_context("spawn")
        parent, child = spawned.Pipe()
        edge = spawned.Process(target=be_edge, args=(model, folder / "certs", args.threads, child))
        edge.start()
        child.close()  # so that the edge server's end is noticed
        try:
            measure(model, args.pairs, parent.recv(), Node(NodeFiles.within(folder / "certs" / "nodes" / "tls")))
        finally:
            edge.terminate()
            edge.join(20)


if __name__ == "__main__":
    main()
