"""The whole system in one process, without a network: the engines of all three daemons, called in turn.

For experiments and tests. The settings are the daemons' own, and so are the messages, which are encoded, checked and counted as
on the wire (`sfl.local_links`). Devices take turns, one step each, in the order of a simulated time, so a run depends on nothing
but its settings and seeds. A device that fails ends alone, as a daemon does: it leaves without a word, and after a while the
others do not wait for it any more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState
from sfl.data.batches import Batch
from sfl.data.split import Splits
from sfl.device.checkpoints import CountedCheckpoints
from sfl.device.prepare import PreparedDevice
from sfl.device.run import DeviceRun, Progress
from sfl.device.trainer import DeviceTrainer
from sfl.edge_server.engine import EdgeEngine
from sfl.edge_server.load import load_half
from sfl.errors import SettingsError, SflError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.messages import member_from_wire
from sfl.fed_server.placement import Placement
from sfl.fed_server.versions import VersionStore
from sfl.local_links import LocalEdge, LocalEdgeServer, LocalFederation, Tamper
from sfl.model.cut import DeviceHalf, EdgeHalf
from sfl.model.lora import AdapterSlots
from sfl.model.seeds import dropout_seed
from sfl.settings import DaemonSettings, DeviceSettings, EdgeSettings, FedSettings, WorkerSettings
from sfl.simulated_time import Clock, DeviceSpeed, Post
from sfl.telemetry import MetricsWriter, log
from sfl.v1 import federation_pb2
from sfl.wire.frames import Traffic

_EDGE = "edge"
_TICK_S = 1.0  # of simulated time, as the federation server's daemon ticks
_GIVE_UP_S = 3600.0  # of simulated time in which nothing but ticks happens


class LoadedHalves:
    """Halves of bases, loaded once for all devices and runs that can share them, as adapters are mounted in turn.

    All devices' halves are kept, and the edge's last one.
    """

    def __init__(self) -> None:
        self._devices: dict[tuple[Any, ...], tuple[DeviceHalf, AdapterSlots]] = {}
        self._edge: tuple[tuple[Any, ...], tuple[EdgeHalf, AdapterSlots, AdapterState]] | None = None

    def device(self, device: PreparedDevice) -> tuple[DeviceHalf, AdapterSlots]:
        """As `PreparedDevice.load_half`."""
        settings = device.settings
        formats = (settings.precision, settings.compute_format, settings.run_on)
        key = (device.model, device.lora, device.cut, settings.checkpointing, *formats)
        if key not in self._devices:
            self._devices[key] = device.load_half()
        return self._devices[key]

    def edge(self, settings: EdgeSettings, lora: LoraSpec, labels: Sequence[str]) -> tuple[EdgeHalf, AdapterSlots, AdapterState]:
        """As `sfl.edge_server.load.load_half`."""
        shape = (settings.model, settings.task, settings.lowest_cut, settings.seed, lora, tuple(labels))
        key = (*shape, settings.precision, settings.compute_format, settings.run_on)
        if self._edge is None or self._edge[0] != key:
            self._edge = None  # before the next one takes its memory
            self._edge = key, load_half(settings, lora, labels)
        return self._edge[1]


@dataclass(frozen=True)
class Published:
    """A version as it came: `steps` local steps of all devices before it, bytes that the federation server had received and
    sent, and the seconds since the start, simulated and on this machine."""

    version: int
    steps: int
    bytes_received: int
    bytes_sent: int
    simulated_s: float
    wall_s: float


@dataclass(frozen=True)
class Simulated:
    """A finished simulation: the federation with its last version, each device's own adapter after its last step, the
    trainers, which can still evaluate, when each version came, the bytes that the servers have counted, and why devices that did
    not come to their end were lost."""

    federation: Federation
    local: dict[str, AdapterState]
    trainers: dict[str, DeviceTrainer]
    published: list[Published]
    fed_traffic: Traffic
    edge_traffic: Traffic  # between the edge and its devices
    device_traffic: dict[str, tuple[Traffic, Traffic]]  # with the edge, and with the federation server
    lost: dict[str, SflError] = field(default_factory=dict)


@dataclass(frozen=True)
class Conditions:
    """What a simulation has that daemons have not: who is how fast, examples that replace a device's own, tampered updates."""

    speeds: Mapping[str, DeviceSpeed] = field(default_factory=dict)
    splits: Mapping[str, Splits] = field(default_factory=dict)
    tamper: Tamper | None = None


@dataclass(frozen=True)
class _Running:
    run: DeviceRun
    turns: Iterator[Progress]
    clock: Clock
    trainer: DeviceTrainer
    edge: LocalEdge
    federation: LocalFederation

    def local_adapter(self) -> AdapterState:
        return self.trainer.adapter.values() | self.edge.values()


def simulate(
    fed: FedSettings,
    devices: Sequence[DeviceSettings],
    out: Path,
    edge: EdgeSettings | None = None,
    *,
    conditions: Conditions | None = None,
    halves: LoadedHalves | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Simulated:
    """Run `devices` to their end; versions and metrics are written below `out`, as by the daemons of a demo.

    All devices have the same model. Without `edge` the edge server is set as the first device is. `on_step` hears the number of
    local steps so far, of all devices together. A device whose turn or update raises an `SflError` is lost, and the others go on;
    when all are lost, the last one's error is raised.
    """
    conditions, halves, started = conditions or Conditions(), halves or LoadedHalves(), monotonic()
    prepared = [PreparedDevice.of(settings, conditions.splits.get(settings.name)) for settings in devices]
    first = prepared[0]
    time, post, traffic = Clock(), Post(), Traffic()
    running: dict[str, _Running] = {}
    published: list[Published] = []
    with ExitStack() as files:
        metrics = files.enter_context(MetricsWriter(out / fed.name / "metrics.jsonl"))
        federation = Federation(fed, VersionStore(fed.adapters or out / "adapters"), metrics, clock=time)

        def note_version() -> None:
            version = federation.version
            if version is not None and version > (published[-1].version if published else -1):
                steps = sum(device.run.steps for device in running.values())
                counted = traffic.received, traffic.sent
                published.append(Published(version, steps, *counted, time.now, monotonic() - started))

        federation.on_change = note_version
        for device in prepared:
            federation.join(member_from_wire(device.join_request()))
            federation.watch_begins(device.settings.name)
        if federation.agreement is None or len(devices) < fed.devices:
            raise federation.failure or SettingsError(f"{fed.devices} devices are expected, {len(devices)} take part")
        server = _edge(federation, edge or _edge_like(first.settings), first, traffic, conditions, halves)
        for device in prepared:
            own = files.enter_context(MetricsWriter(out / device.settings.name / "metrics.jsonl"))
            running[device.settings.name] = _begin(device, federation, server, traffic, post, own, conditions, halves)
        lost = _Turns(running, federation, post, time).take(on_step)
    return Simulated(
        federation,
        {name: device.local_adapter() for name, device in running.items()},
        {name: device.trainer for name, device in running.items()},
        published,
        traffic,
        server.traffic,
        {name: (device.edge.traffic, device.federation.traffic) for name, device in running.items()},
        lost,
    )


def _edge_like(device: DeviceSettings) -> EdgeSettings:
    shared = {key: getattr(device, key) for key in WorkerSettings.model_fields if key not in DaemonSettings.model_fields}
    return EdgeSettings(name=_EDGE, **shared)


def _edge(
    federation: Federation,
    settings: EdgeSettings,
    first: PreparedDevice,
    traffic: Traffic,
    conditions: Conditions,
    halves: LoadedHalves,
) -> LocalEdgeServer:
    """The edge server, which has joined and proposed version 0."""
    if federation.agreement is None:
        raise SettingsError("an edge needs the agreement of all devices")
    request = first.join_request()
    request.name, request.role, request.cut = _EDGE, federation_pb2.EDGE, settings.lowest_cut
    for of_devices in ("examples", "labels", "columns", "max_length", "rank"):
        request.ClearField(of_devices)
    federation.join(member_from_wire(request))
    half, slots, initial = halves.edge(settings, first.lora, federation.agreement.labels)
    head = half.family.head if settings.task == "classification" else ()
    link = LocalFederation(federation, _EDGE, traffic, tamper=conditions.tamper)
    link.propose(Placement(half.family.blocks, head, half.config.num_hidden_layers), initial)
    return LocalEdgeServer(EdgeEngine(half, slots, settings.task, first.lora, first.fingerprint), link)


def _begin(
    device: PreparedDevice,
    federation: Federation,
    server: LocalEdgeServer,
    traffic: Traffic,
    post: Post,
    metrics: MetricsWriter,
    conditions: Conditions,
    halves: LoadedHalves,
) -> _Running:
    settings, version = device.settings, federation.version
    if federation.agreement is None or version is None:
        raise SettingsError("a run needs the agreement and version 0")
    half, slots = halves.device(device)
    speed, clock = conditions.speeds.get(settings.name, DeviceSpeed()), Clock()
    link = LocalFederation(
        federation, settings.name, traffic, rank=device.rank, speed=speed, clock=clock, post=post, tamper=conditions.tamper
    )
    policy = federation.policy(device.settings.name)
    adapter = device.adapter(slots, link.fetch(version, 0, device.cut), version, policy)
    edge = LocalEdge(server, device.session_request(version, policy), speed, clock)
    plan = device.plan(federation.agreement.labels)
    plan = replace(plan, validation=partial(_timed, plan.validation, speed, clock))
    trainer = DeviceTrainer(half, adapter, edge, settings.task, settings.micro_batch)
    traffics = (edge.traffic, link.traffic)
    run = DeviceRun(plan, trainer, policy, link, metrics, traffics, link.uplink, clock, CountedCheckpoints())
    run.begin()
    turns = _own_chance(run, dropout_seed(settings.seed, settings.name, "device"))
    return _Running(run, turns, clock, trainer, edge, link)


def _timed(validation: Callable[[], Iterable[Batch]], speed: DeviceSpeed, clock: Clock) -> Iterator[Batch]:
    for batch in validation():
        clock.now += speed.validation_s
        yield batch


class _Turns:
    """What comes first happens first: an arrival, the federation server's tick each second, or the turn of a device.

    A device that waits for a version sleeps until it is there.
    """

    def __init__(self, running: Mapping[str, _Running], federation: Federation, post: Post, time: Clock) -> None:
        self._running, self._federation, self._post, self._time = running, federation, post, time
        self._going = dict(running)
        self._waiting = set[str]()
        self._ended = set[str]()
        self._lost: dict[str, SflError] = {}

    def take(self, on_step: Callable[[int], None] | None) -> dict[str, SflError]:
        """To the end of all; the errors of those that were lost.

        Raises the last of these when all were, and `SflError` when those that are left have waited too long.
        """
        going, waiting, federation, post, time = self._going, self._waiting, self._federation, self._post, self._time
        heard = 0.0  # when something other than a tick last happened
        while going or not federation.finished:
            name = min((name for name in going if name not in waiting), key=lambda name: going[name].clock.now, default=None)
            next_turn = math.inf if name is None else going[name].clock.now
            version, coming = federation.version, min(post.next_s, next_turn)
            time.now = min(coming, math.floor(time.now / _TICK_S + 1) * _TICK_S)
            if time.now < coming:
                federation.tick()
                if coming == math.inf and time.now - heard > _GIVE_UP_S:
                    raise SflError(f"{', '.join(going) or 'all'} wait for a version that nobody will bring about")
            else:
                heard = time.now
                if coming == post.next_s:
                    self._try(post.next_sender, post.deliver)
                elif name is not None:
                    self._try(name, partial(self._turn, name))
                    if on_step is not None:
                        on_step(sum(device.run.steps for device in self._running.values()))
            if federation.version != version or federation.finished:
                for other in waiting:
                    going[other].clock.now = max(going[other].clock.now, time.now)
                waiting.clear()
        return self._lost

    def _turn(self, name: str) -> None:
        if name in self._ended:
            self._going.pop(name).edge.close()
            self._federation.leave(name)
            return
        progress = next(self._going[name].turns, None)
        if progress is None:
            self._ended.add(name)  # it leaves once what it has sent has arrived
        elif progress is Progress.WAITING:
            self._waiting.add(name)

    def _try(self, name: str, does: Callable[[], None]) -> None:
        """What `name` does, or is done for it; an error ends it alone, unless it was the last."""
        try:
            does()
        except SflError as error:
            if name in self._lost:
                return  # the rest of what it had sent
            log.error("device '%s' is lost after %d steps: %s", name, self._running[name].run.steps, error)
            self._lost[name] = error
            self._going.pop(name, None)
            self._waiting.discard(name)
            self._federation.watch_ends(name)
            if len(self._lost) == len(self._running):
                raise


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
