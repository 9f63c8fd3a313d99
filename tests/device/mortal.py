"""A device and its edge server in one process that can be killed between any two messages: what they had in memory is dropped,
and what is left is their files. Messages go through the real link and the real service, as bytes; only gRPC is left out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from sfl.adapters.state import AdapterState, device_half, edge_half
from sfl.data.batches import Batches, Encoded, eval_batches
from sfl.device import edge_link
from sfl.device.checkpoints import CheckpointFiles
from sfl.device.daemon import kept_in, open_session
from sfl.device.run import DeviceRun, Progress
from sfl.device.run_plan import RunPlan
from sfl.device.trainer import DeviceTrainer
from sfl.edge_server.engine import EdgeEngine
from sfl.edge_server.service import SplitService, _Stream
from sfl.edge_server.session_files import SessionFiles
from sfl.edge_server.versions import EdgeVersions
from sfl.edge_server.worker import ComputeWorker, arrival
from sfl.errors import SflError, UnreachableError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.members import Member
from sfl.fed_server.messages import half_from_wire
from sfl.fed_server.placement import Placement
from sfl.fed_server.versions import VersionStore, version_numbers
from sfl.model.cut import DeviceHalf
from sfl.model.local_adapter import LocalAdapter, values_in
from sfl.model.lora import inject_lora
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2 import UpdateHeader, UploadPolicy
from sfl.wire.federation import FederationClient
from sfl.wire.frames import Assembler, Traffic, frames
from sfl.wire.split import OptimizerSpec, SessionRequest, rules_from_wire
from sfl.wire.tensors import RawTensor
from tests.edge_server.made import CLASSES, FINGERPRINT, Halves

CUT, STEPS = 2, 7
_WAIT_S = 20.0


class DeviceDiedError(BaseException):
    """The device's process ends here."""


@dataclass
class Fault:
    """Something that happens once, at event number `at`: an exchange with the edge, or a call of the federation server."""

    what: str
    at: int


FAULTS = ("device before", "device after", "edge before", "edge after", "both after", "stream after")


@dataclass
class World:
    """One federation of one device and one edge; `events` are counted over all their lives.

    The device is told its logits' `offsets` after it has begun, and what it and the edge go back to may stem from a version that
    is not there any more: between two lives all but the newest are removed.
    """

    folder: Path
    halves: Halves
    strategy: dict[str, Any]
    fault: Fault | None = None
    checkpoint_steps: int = 3
    offsets: tuple[float, ...] = ()
    versions: list[AdapterState] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    lives: int = 0
    submitted: list[tuple[str, str]] = field(default_factory=list)  # (half, submission) as they arrived first
    contents: dict[tuple[str, str], AdapterState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lock = threading.RLock()
        settings = FedSettings(devices=1, strategy=self.strategy, half_expires_s=3600)  # type: ignore[arg-type]
        self.federation = Federation(settings, VersionStore(self.folder / "adapters"), MetricsWriter(None))
        halves = self.halves
        common: dict[str, Any] = {
            "task": halves.task, "base_model": "m", "model_fingerprint": FINGERPRINT, "lora": halves.lora,
        }  # fmt: skip
        data = {"examples": 23, "labels": ("a", "b", "c"), "columns": ("text",), "max_length": 8}
        self.federation.join(Member("device-1", "device", cut=CUT, **data, **common))
        self.federation.join(Member("edge", "edge", cut=1, **common))
        self.federation.propose("edge", Placement("encoder.layer", ("classifier",), 4), halves.initial)
        self.versions.append(halves.initial)
        self.policy: UploadPolicy = self.federation.policy("device-1")
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.edge = Edge(self)

    def close(self) -> None:
        self.edge.kill()
        self.loop.call_soon_threadsafe(self.loop.stop)

    def restart_edge(self, lost: bool = False) -> None:
        """Another process of the edge server, with the files of the last one, unless they are `lost` too."""
        self.edge.kill()
        self.remove_old_versions()
        if lost:
            for path in (self.folder / "sessions").iterdir():
                path.unlink()
        self.edge = Edge(self)

    def take(self, header: UpdateHeader, state: AdapterState) -> None:
        """What the federation server does with half an update. What comes again must be the same again."""
        half = half_from_wire(header)
        key = half.half, half.submission
        with self.lock:
            if key in self.contents:
                assert all(np.array_equal(self.contents[key][name], state[name]) for name in state), (
                    f"{key} came with other values"
                )
            else:
                self.submitted.append(key)
                self.contents[key] = {name: value.copy() for name, value in state.items()}
            self.federation.submit(half, state)
            newest = self.federation._store.newest()
            if newest is not None and newest.number == len(self.versions):
                self.versions.append(newest.state)

    def remove_old_versions(self) -> None:
        with self.lock:
            for number in version_numbers(self.folder / "adapters"):
                self.federation._store.remove(number)

    def has(self, half: str, submission: str) -> bool:
        """Whether a half has arrived, and all is done that comes of it."""
        with self.lock:
            return (half, submission) in self.submitted

    def happens(self, what: str) -> Fault | None:
        """Count an event; what is to happen at it."""
        self.events.append(what)
        return self.fault if self.fault is not None and len(self.events) - 1 == self.fault.at else None


class Edge:
    """One life of the edge server."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.may_send = threading.Event()
        old = world.halves.engine
        engine = EdgeEngine(old._half, old._slots, old.task, world.halves.lora, FINGERPRINT)
        self.worker = ComputeWorker(arrival)
        client = cast(FederationClient, self)
        files = SessionFiles(world.folder / "sessions")
        self.service = SplitService(engine, self.worker, EdgeVersions(client, 1), client, MetricsWriter(None), 60, files)
        self.run(self._begin())

    async def _begin(self) -> None:
        self.service.send_kept()
        self.may_send.set()

    def kill(self) -> None:
        self.alive = False
        self.may_send.set()
        self.worker.stop()

    def run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.world.loop).result(_WAIT_S)

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0, rank: int | None = None) -> AdapterState:
        with self.world.lock:
            return self.world.federation.fetch("edge", version, max(first_layer, 1))

    def submit(self, header: UpdateHeader, state: AdapterState) -> None:
        """The federation server's client of this edge; dead when the edge is."""
        assert self.may_send.wait(_WAIT_S)
        if not self.alive:
            raise UnreachableError("this edge is dead")
        self.world.take(header, state)


class Stream:
    """In the place of the link's gRPC stream: frames to bytes, to the service's answers, and back."""

    world: World

    def __init__(self, stub: object, traffic: Traffic, hear: object) -> None:
        self._traffic = traffic
        self._stream = _Stream()
        self._edge = self.world.edge

    def exchange(self, message: Any, tensors: Sequence[RawTensor]) -> Any:
        world, edge = self.world, self._edge
        fault = world.happens(f"edge {message.WhichOneof('body')}")
        what = "" if fault is None else fault.what
        if what == "device before":
            raise DeviceDiedError
        if what in ("edge before", "edge lost", "both lost"):
            world.restart_edge(lost=what.endswith("lost"))
        if what == "both lost":
            raise DeviceDiedError
        if not edge.alive:
            raise UnreachableError("the stream is broken")
        edge.may_send.clear()
        try:
            answer = self._carry(edge.run(edge.service._answer(self._stream, *self._carry((message, tensors)))))
        except SflError as error:
            raise AssertionError(f"the edge refused: {error}") from error
        if what in ("edge after", "both after"):
            world.restart_edge()
        if what in ("device after", "both after"):
            edge.may_send.set()
            raise DeviceDiedError
        if what in ("edge after", "stream after"):
            edge.may_send.set()
            raise UnreachableError("the stream broke")
        edge.may_send.set()
        return answer

    def _carry(self, whole: Any) -> Any:
        message, tensors = whole
        assembler: Any = Assembler(self._traffic)
        for frame in frames(message, tensors, self._traffic):
            found = assembler.feed(type(frame).FromString(frame.SerializeToString()))
            if found is not None:
                return found
        raise AssertionError("a message was not whole")

    def end(self) -> None:
        if self._edge.alive:
            self._edge.run(self._detach())

    async def _detach(self) -> None:
        self._edge.service._detach(self._stream)


class FedLink:
    """The federation server as the device has it. A submission is answered when both halves are there, so that a run depends on
    nothing but its seeds."""

    finished = False

    def __init__(self, world: World) -> None:
        self._world = world

    @property
    def policy(self) -> UploadPolicy:
        policy = UploadPolicy()
        policy.CopyFrom(self._world.policy)
        policy.logit_offsets.extend(self._world.offsets)
        return policy

    @property
    def newest(self) -> int | None:
        with self._world.lock:
            return self._world.federation.version

    def fetch_newest(self, last_layer: int) -> tuple[int, AdapterState]:
        self._meet("fetch")
        with self._world.lock:
            version = self._world.federation.version or 0
            return version, self._world.federation.fetch("device-1", version, 0, last_layer)

    def submit(self, header: UpdateHeader, state: AdapterState) -> bool:
        fault = self._meet("submit")
        self._world.take(header, state)
        deadline = time.monotonic() + _WAIT_S
        while not self._world.has("edge", header.submission):
            if not self._world.edge.service._uploads.knows("device-1", header.submission):
                return False  # nor will it, as that edge has lost it
            assert time.monotonic() < deadline, f"the edge's half of {header.submission} never came"
            time.sleep(0.001)
        if fault is not None and fault.what == "device after":
            raise DeviceDiedError
        if fault is not None and fault.what == "edge after":
            self._world.restart_edge()
        return True

    def trained(self) -> None:
        self._meet("trained")

    def _meet(self, what: str) -> Fault | None:
        fault = self._world.happens(f"fed {what}")
        if fault is not None and fault.what.endswith("lost"):
            self._world.edge.run(self._world.edge.service._uploads.finish("device-1"))  # what the edge has sent is not lost
        if fault is not None and fault.what == "device before":
            raise DeviceDiedError
        if fault is not None and fault.what in ("edge before", "edge lost", "both lost"):
            self._world.restart_edge(lost=fault.what.endswith("lost"))
        if fault is not None and fault.what == "both lost":
            raise DeviceDiedError
        return fault


class Device:
    """What all lives of a device have in common: its settings, its data, its half of the base."""

    def __init__(self, world: World) -> None:
        self._world = world
        chance = np.random.default_rng(3)
        ids = tuple(chance.integers(4, 100, size) for size in chance.integers(3, 9, 23))
        self._encoded = Encoded(ids, chance.integers(0, CLASSES, len(ids)), 0)
        self._half = DeviceHalf(world.halves.model(), CUT)
        self._slots = inject_lora(self._half, world.halves.lora)

    def live(self) -> AdapterState:
        """From the start of a process to its end, which may come early; the device's half of the adapter."""
        world = self._world
        world.lives += 1
        torch.manual_seed(11)
        checkpoints = CheckpointFiles(world.folder / "state")
        try:
            return self._run(checkpoints)
        finally:
            checkpoints.close()

    def _run(self, checkpoints: CheckpointFiles) -> AdapterState:
        world, policy = self._world, self._world.policy
        fed = FedLink(world)
        kept = kept_in(checkpoints)
        checkpoints.require({"federation": "this one"})
        version = kept["version"] if kept else 0
        state = values_in(checkpoints.newest()[1]) if kept else device_half(world.halves.initial, CUT)
        optimizer = OptimizerSpec("adamw", 0.02, 0.01, decay_steps=2 * STEPS)
        rules = rules_from_wire(policy)
        adapter = LocalAdapter(self._slots, state, CUT, version, optimizer, 0, rules)
        request = SessionRequest(
            f"life-{world.lives}", "device-1", world.halves.task, CUT, version, FINGERPRINT, world.halves.lora, optimizer, 5,
            "fp32", 0, rules,
        )  # fmt: skip
        link = edge_link.GrpcEdgeLink("nowhere", request, 1, 5, held=lambda: checkpoints.held)
        trainer = DeviceTrainer(self._half, adapter, link, world.halves.task)
        plan = RunPlan(
            device="device-1",
            session=request.session,
            cut=CUT,
            steps=STEPS,
            batches=Batches(self._encoded, 4, shuffle=True, seed=1),
            validation=lambda: eval_batches(self._encoded, 4, 4),
            test=lambda: eval_batches(self._encoded, 8),
            checkpoint_steps=world.checkpoint_steps,
        )
        with MetricsWriter(world.folder / "metrics.jsonl") as metrics:
            run = DeviceRun(plan, trainer, policy, fed, metrics, (link.traffic,), checkpoints=checkpoints)
            open_session(run, link, checkpoints.session)
            for progress in run:
                assert progress is Progress.TRAINED, "one device's submission makes a version at once"
            link.close()
        checkpoints.clear()
        return adapter.values()


@dataclass
class Outcome:
    """What is compared: the global versions, the device's own adapter, what was submitted, and each step's loss."""

    versions: list[AdapterState]
    local: AdapterState
    submitted: list[tuple[str, str]]
    losses: dict[int, float]
    events: list[str]
    lives: int


def live_through(
    folder: Path,
    halves: Halves,
    strategy: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    fault: Fault | None = None,
    losses_of: Callable[[Path], dict[int, float]] = lambda folder: {},
    checkpoint_steps: int = 3,
    offsets: tuple[float, ...] = (),
) -> Outcome:
    """A run to its end, through as many lives as it takes."""
    folder.mkdir(parents=True)
    world = World(folder, halves, strategy, fault, checkpoint_steps, offsets)
    stream = type("WorldStream", (Stream,), {"world": world})
    monkeypatch.setattr(edge_link, "_Stream", stream)
    monkeypatch.setattr(edge_link, "dial", lambda *arguments: NoChannel())
    monkeypatch.setattr(edge_link, "SplitTrainingStub", lambda channel: None)
    monkeypatch.setattr(edge_link.time, "sleep", lambda seconds: None)
    device = Device(world)
    try:
        local = None
        while local is None:
            try:
                local = device.live()
            except DeviceDiedError:
                assert world.lives < 5
                world.remove_old_versions()
        assert world.federation.version == len(world.versions) - 1
        submitted = [(half, submission.partition("/")[2]) for half, submission in world.submitted]
        return Outcome(world.versions, local, submitted, losses_of(folder), world.events, world.lives)
    finally:
        world.close()


class NoChannel:
    """In the place of a gRPC channel."""

    def close(self) -> None:
        """There is nothing to close."""


def same(left: AdapterState, right: AdapterState) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def at_edge(state: AdapterState) -> AdapterState:
    return edge_half(state, CUT)
