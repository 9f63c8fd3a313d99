"""What the tests of the edge server and of its link share: a tiny edge, behind gRPC too, and a network that can be cut."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import PretrainedConfig

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState, device_half, edge_half, total
from sfl.edge_server.engine import EdgeEngine
from sfl.edge_server.service import SplitService
from sfl.edge_server.session_files import SessionFiles
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ComputeWorker, arrival
from sfl.errors import RefusedError, SflError
from sfl.model.cut import DeviceHalf, EdgeHalf
from sfl.model.local_adapter import LocalAdapter
from sfl.model.lora import head_state, initial_adapter, inject_lora, resolve_targets
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2 import UpdateHeader
from sfl.v1.split_pb2_grpc import add_SplitTrainingServicer_to_server
from sfl.wire.channel import serve
from sfl.wire.federation import FederationClient
from sfl.wire.split import CutBatch, OptimizerSpec, SessionRequest
from tests.tiny import tiny_config, tiny_model

Result = TypeVar("Result")

LORA = LoraSpec(2, 4.0, 0.0, ())
FINGERPRINT = "f" * 64
CLASSES = 3


@dataclass
class Halves:
    """A tiny model, cut: an edge engine and what its devices need. All of the same arguments are equal."""

    family: str = "bert"
    task: str = "classification"
    lowest_cut: int = 1
    dropout: float = 0.0
    hidden: int = 32
    rank: int = LORA.rank
    config: PretrainedConfig = field(init=False)
    engine: EdgeEngine = field(init=False)
    initial: AdapterState = field(init=False)

    def __post_init__(self) -> None:
        self.config = tiny_config(self.family, layers=4, hidden=self.hidden)
        self.lora = resolve_targets(self.config, LoraSpec(self.rank, 2.0 * self.rank, self.dropout, ()))
        half = EdgeHalf(self.model(), self.lowest_cut)
        self.initial = initial_adapter(self.config, cast(Any, self.task), self.lora, head_state(half), 0)
        self.engine = EdgeEngine(half, inject_lora(half, self.lora), self.task, self.lora, FINGERPRINT)

    def model(self) -> Any:
        """The whole model, uncut and without LoRA."""
        return tiny_model(tiny_config(self.family, layers=4, hidden=self.hidden), self.task, CLASSES)

    def request(self, device: str = "device-1", cut: int = 2, **changes: Any) -> SessionRequest:
        common: dict[str, Any] = {
            "session": f"{device}-1",
            "task": self.task,
            "version": 0,
            "model_fingerprint": FINGERPRINT,
            "lora": self.lora,
            "optimizer": OptimizerSpec("adamw", 0.01),
            "seed": 5,
            "dtype": "fp32",
        }
        return SessionRequest(device=device, cut=cut, **{**common, **changes})

    def batch(self, seed: int = 0, size: int = 3, tokens: int = 6) -> CutBatch:
        """Random, as if it had left a device; the same for the same seed."""
        chance = torch.Generator().manual_seed(seed)
        activation = torch.randn(size, tokens, self.hidden, generator=chance)
        mask = torch.ones(size, tokens, dtype=torch.int64)
        mask[0, tokens // 2 :] = 0
        shape = (size, tokens) if self.task == "causal-lm" else (size,)
        return CutBatch(activation, mask, torch.randint(0, CLASSES, shape, generator=chance))

    def device(self, cut: int = 2) -> tuple[DeviceHalf, LocalAdapter]:
        """The device's side of `request`."""
        return self.device_of(self.request(cut=cut), self.initial)

    def device_of(self, request: SessionRequest, state: AdapterState) -> tuple[DeviceHalf, LocalAdapter]:
        """The device's side of a session, which begins with `state`."""
        half, cut = DeviceHalf(self.model(), request.cut), request.cut
        slots, rules = inject_lora(half, self.lora), request.rules
        state = device_half(state, cut)
        return half, LocalAdapter(slots, state, cut, request.version, request.optimizer, request.rank, rules)


def at_rank(state: AdapterState, rank: int) -> AdapterState:
    """The first `rank` rows of A and columns of B; all for 0."""
    first = slice(rank or None)
    return {
        key: value[first] if key.part == "A" else value[:, first] if key.part == "B" else value for key, value in state.items()
    }


class RecordingFederation:
    """The federation server as the edge sees it: versions to fetch, and a list of what was submitted."""

    def __init__(self, initial: AdapterState) -> None:
        self.versions = {0: initial}
        self.submitted: list[tuple[UpdateHeader, AdapterState]] = []
        self.fetches: list[int] = []
        self.ranks: list[int | None] = []  # of these fetches
        self.open = threading.Event()  # submissions wait for it
        self.open.set()
        self.failure: SflError | None = None

    def publish(self, seed: int) -> AdapterState:
        """The next version: the last one with noise."""
        chance = torch.Generator().manual_seed(seed)
        newest = max(self.versions)
        noise = {key: torch.randn(value.shape, generator=chance).numpy() for key, value in self.versions[newest].items()}
        self.versions[newest + 1] = total(self.versions[newest], noise)
        return self.versions[newest + 1]

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0, rank: int | None = None) -> AdapterState:
        self.fetches.append(version)
        self.ranks.append(rank)
        if self.failure is not None:
            raise self.failure
        if version not in self.versions:
            raise RefusedError(f"there is no version {version}")
        state = edge_half(at_rank(self.versions[version], rank or 0), first_layer)
        return device_half(state, last_layer) if last_layer else state

    def submit(self, header: UpdateHeader, state: AdapterState) -> None:
        if not self.open.wait(20):
            raise RefusedError("the test never opened the federation")
        if self.failure is not None:
            raise self.failure
        self.submitted.append((header, state))


class ServedEdge:
    """An edge behind gRPC, on a loop in a thread of its own."""

    def __init__(
        self, halves: Halves, keep_s: float = 30.0, metrics: MetricsWriter | None = None, folder: Path | None = None
    ) -> None:
        self.federation = RecordingFederation(halves.initial)
        self.address = "127.0.0.1:0"
        self.halves = halves
        self._keep_s = keep_s
        self._files = None if folder is None else SessionFiles(folder)
        self._metrics = metrics or MetricsWriter(None)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="edge", daemon=True)
        self._thread.start()
        self.worker = ComputeWorker(arrival)
        self.service = self.fresh_service(halves)
        self.start()

    def fresh_service(self, halves: Halves) -> SplitService:
        """One that knows no session, as after a restart."""
        federation = cast(FederationClient, self.federation)
        versions = EdgeVersions(federation, halves.lowest_cut)
        self.service = SplitService(halves.engine, self.worker, versions, federation, self._metrics, self._keep_s, self._files)
        return self.service

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    def start(self) -> None:
        async def work() -> None:
            self._server, self.address = serve(self.address)
            add_SplitTrainingServicer_to_server(self.service, self._server)
            await self._server.start()

        self.run(work())

    def stop(self) -> None:
        """Break every stream; sessions stay until a `fresh_service`."""
        self.run(self._server.stop(0))

    def close(self) -> None:
        self.federation.open.set()
        self.stop()
        self.worker.stop()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@contextlib.contextmanager
def served(halves: Halves, **changes: Any) -> Iterator[ServedEdge]:
    edge = ServedEdge(halves, **changes)
    try:
        yield edge
    finally:
        edge.close()


class Network:
    """A way to `target` that can be cut, be slow, swallow what passes, or break once so many bytes went up."""

    def __init__(self, target: str) -> None:
        self._target = (target.rpartition(":")[0], int(target.rpartition(":")[2]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.swallows = False
        self.pause_s = 0.0  # between 4096 bytes up and the next
        self.left: int | None = None  # bytes up until it is cut
        self.connections = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
                self.connections += 1
                self._sockets += [near, far]
                threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if up and self.left is not None:
                    self.left -= len(data)
                    if self.left < 0:
                        self.left = None
                        self.cut()
                        return
                if up and self.pause_s:
                    time.sleep(self.pause_s)
                if not self.swallows:
                    sink.sendall(data)

    def cut(self) -> None:
        """Break every connection; new ones are taken."""
        sockets, self._sockets = self._sockets, []
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def close(self) -> None:
        self._listener.close()
        self.cut()


@contextlib.contextmanager
def network(target: str) -> Iterator[Network]:
    made = Network(target)
    try:
        yield made
    finally:
        made.close()


def eventually(condition: Any, within_s: float = 5.0) -> None:
    """Wait for what another thread brings about."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
