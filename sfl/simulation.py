"""The whole system in one process, without a network: the engines of all three daemons, called in turn.

For tests and experiments. The settings are the daemons' own; devices take turns, one step each, so a run depends on
nothing but its settings and seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from sfl.adapters.state import AdapterState
from sfl.device.prepare import PreparedDevice
from sfl.device.run import DeviceRun, Progress
from sfl.device.trainer import DeviceTrainer
from sfl.edge_server.engine import EdgeEngine, Session
from sfl.edge_server.load import load_half
from sfl.errors import SettingsError, SflError
from sfl.fed_server.coordinator import Federation, Placement
from sfl.fed_server.messages import half_from_wire, member_from_wire
from sfl.fed_server.pool import Half
from sfl.fed_server.versions import VersionStore
from sfl.model.local_adapter import LocalAdapter
from sfl.model.seeds import dropout_seed
from sfl.settings import DaemonSettings, DeviceSettings, EdgeSettings, FedSettings, WorkerSettings
from sfl.telemetry import MetricsWriter
from sfl.v1 import federation_pb2
from sfl.wire.split import CutBatch, Evaluation, SessionRequest, StepResult

_EDGE = "edge"


class LocalFederation:
    """The federation server, called directly by the device `name`."""

    def __init__(self, federation: Federation, name: str) -> None:
        self._federation = federation
        self._name = name

    @property
    def newest(self) -> int | None:
        return self._federation.version

    @property
    def finished(self) -> bool:
        return self._federation.finished

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0) -> AdapterState:
        return self._federation.fetch(self._name, version, first_layer, last_layer)

    def submit(self, header: federation_pb2.UpdateHeader, state: AdapterState) -> None:
        self._federation.submit(half_from_wire(header), state)


class LocalEdge:
    """The edge server, called directly by one device. Its half of a submission reaches the federation server first."""

    def __init__(self, engine: EdgeEngine, federation: Federation, request: SessionRequest) -> None:
        self._engine = engine
        self._federation = federation
        self._session: Session = engine.open(request, federation.fetch(_EDGE, request.version, request.cut))

    def step(self, step: int, version: int, batch: CutBatch) -> StepResult:
        return self._engine.step(self._session, step, version, batch)

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        return self._engine.evaluate(self._session, version, batch)

    def submit(self, submission: str, version: int) -> None:
        progress = self._engine.take_progress(self._session, submission, version)
        self._federation.submit(Half(submission, self._session.request.device, "edge", version), progress)

    def adopt(self, version: int, keep_progress: bool) -> None:
        state = self._federation.fetch(_EDGE, version, self._session.request.cut)
        self._engine.adopt(self._session, version, state, keep_progress)

    def values(self) -> AdapterState:
        """The edge's half of the device's adapter."""
        return self._session.adapter.values()


@dataclass(frozen=True)
class Simulated:
    """A finished simulation: the federation with its last version, and each device's own adapter after its last step."""

    federation: Federation
    local: dict[str, AdapterState]


@dataclass(frozen=True)
class _Running:
    run: DeviceRun
    seed: int
    trainer: DeviceTrainer
    edge: LocalEdge

    def local_adapter(self) -> AdapterState:
        return self.trainer.adapter.values() | self.edge.values()


def simulate(fed: FedSettings, devices: Sequence[DeviceSettings], out: Path, edge: EdgeSettings | None = None) -> Simulated:
    """Run `devices` to their end; versions and metrics are written below `out`, as by the daemons of a demo.

    All devices have the same model. Without `edge` the edge server is set as the first device is.
    """
    prepared = [PreparedDevice.of(settings) for settings in devices]
    first = prepared[0]
    with ExitStack() as files:
        metrics = files.enter_context(MetricsWriter(out / fed.name / "metrics.jsonl"))
        federation = Federation(fed, VersionStore(fed.adapters or out / "adapters"), metrics)
        for device in prepared:
            federation.join(member_from_wire(device.join_request()))
            federation.watch_begins(device.settings.name)
        if federation.agreement is None or len(devices) < fed.devices:
            raise federation.failure or SettingsError(f"{fed.devices} devices are expected, {len(devices)} take part")
        engine = _edge(federation, edge or _edge_like(first.settings), first, federation.agreement.labels)
        running = {}
        for device in prepared:
            own = files.enter_context(MetricsWriter(out / device.settings.name / "metrics.jsonl"))
            running[device.settings.name] = _begin(device, federation, engine, own)
        _take_turns(running, federation)
    return Simulated(federation, {name: device.local_adapter() for name, device in running.items()})


def _edge_like(device: DeviceSettings) -> EdgeSettings:
    shared = {key: getattr(device, key) for key in WorkerSettings.model_fields if key not in DaemonSettings.model_fields}
    return EdgeSettings(name=_EDGE, **shared)


def _edge(federation: Federation, settings: EdgeSettings, first: PreparedDevice, labels: Sequence[str]) -> EdgeEngine:
    request = first.join_request()
    request.name, request.role, request.cut = _EDGE, federation_pb2.EDGE, settings.lowest_cut
    federation.join(member_from_wire(request))
    half, slots, initial = load_half(settings, first.lora, labels)
    head = half.family.head if settings.task == "classification" else ()
    federation.propose(_EDGE, Placement(half.family.blocks, head, half.config.num_hidden_layers), initial)
    return EdgeEngine(half, slots, settings.task, first.lora, first.fingerprint)


def _begin(device: PreparedDevice, federation: Federation, engine: EdgeEngine, metrics: MetricsWriter) -> _Running:
    settings, version = device.settings, federation.version
    if federation.agreement is None or version is None:
        raise SettingsError("a run needs the agreement and version 0")
    half, slots = device.load_half()
    link = LocalFederation(federation, settings.name)
    state = link.fetch(version, 0, device.cut)
    adapter = LocalAdapter(slots, state, device.cut, version, device.optimizer)
    edge = LocalEdge(engine, federation, device.session_request(version))
    plan = device.plan(federation.agreement.labels)
    trainer = DeviceTrainer(half, adapter, edge, settings.task, settings.micro_batch)
    seed = dropout_seed(settings.seed, settings.name, "device")
    return _Running(DeviceRun(plan, trainer, federation.policy(), link, metrics), seed, trainer, edge)


def _take_turns(running: Mapping[str, _Running], federation: Federation) -> None:
    going = {name: _own_chance(device.run, device.seed) for name, device in running.items()}
    while going:
        trained = False
        version = federation.version
        for name, run in list(going.items()):
            progress = next(run, None)
            trained = trained or progress is Progress.TRAINED
            if progress is None:
                del going[name]
                federation.leave(name)
        if going and not trained and federation.version == version:
            raise SflError(f"{', '.join(going)} wait for a version that nobody will bring about")


def _own_chance(run: DeviceRun, seed: int) -> Iterator[Progress]:
    """`run`, what is random in it (dropout) drawn as in a process of its own that was seeded with `seed`."""
    steps = iter(run)
    state = torch.Generator().manual_seed(seed).get_state()
    while True:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            progress = next(steps, None)
            state = torch.get_rng_state()
        if progress is None:
            return
        yield progress
