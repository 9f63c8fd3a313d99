"""What the tests of the federation server share: a clock, members, adapters."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import HEAD, AdapterKey, AdapterState, device_half, edge_half
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.members import Member, Role
from sfl.fed_server.placement import Placement
from sfl.fed_server.pool import Half
from sfl.fed_server.updates import Update
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter

LAYERS = 4
PLACEMENT = Placement("model.layers", ("score",), LAYERS)
LORA = LoraSpec(2, 4.0, 0.0, ("q",))


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def adapter(seed: int, scale: float = 1.0) -> AdapterState:
    """A whole adapter of `LAYERS` layers and a head with random values."""
    rng = np.random.default_rng(seed)
    state = {}
    for layer in range(LAYERS):
        state[AdapterKey(layer, "q", "A")] = rng.normal(0, scale, (2, 3)).astype("f4")
        state[AdapterKey(layer, "q", "B")] = rng.normal(0, scale, (5, 2)).astype("f4")
    state[AdapterKey(HEAD, "score", "weight")] = rng.normal(0, scale, (2, 5)).astype("f4")
    return state


def update(name: str, seed: int = 0, state: AdapterState | None = None, **changes: Any) -> Update:
    """A device's update, `adapter(seed)` unless `state` says otherwise."""

    def read(keys: Collection[AdapterKey] | None) -> AdapterState:
        found = adapter(seed) if state is None else state
        return {key: value.copy() for key, value in found.items() if keys is None or key in keys}

    fields: dict[str, Any] = {"version": 0, "examples": 1, "submissions": 1, "pooled": 1, "trained_on": 8, "steps": 1}
    fields |= {"rank": 2, "cut": 1, "lag": 0, "read": read, "base": lambda: adapter(0)}
    return Update(name, **{**fields, **changes})


COMMON: dict[str, Any] = {
    "task": "classification",
    "base_model": "base",
    "model_fingerprint": "abc",
    "lora": LORA,
    "cut": 1,
}
DATA: dict[str, Any] = {"examples": 10, "labels": ("benign", "scan"), "columns": ("proto",), "max_length": 32}


def device(name: str, **changes: Any) -> Member:
    return Member(name, "device", **{**COMMON, **DATA, **changes})


def edge(name: str = "edge", **changes: Any) -> Member:
    return Member(name, "edge", **{**COMMON, **changes})


def federation(
    folder: Path,
    devices: int,
    clock: Callable[[], float] | None = None,
    metrics: MetricsWriter | None = None,
    pool: Path | None = None,
    **changes: Any,
) -> Federation:
    """A federation that keeps its versions in `folder`; `changes` are settings, tables of them as dicts."""
    settings = FedSettings.model_validate({"devices": devices, **changes})
    out = pool.parent if pool is not None else None  # where the pool is `pool`
    return Federation(settings, VersionStore(folder), metrics or MetricsWriter(None), clock or Clock(), out)


def started(folder: Path, members: list[Member], clock: Callable[[], float] | None = None, **changes: Any) -> Federation:
    """A federation whose members have joined and watch, with version 0 published."""
    fed = federation(folder, len(members), clock, **changes)
    for member in [*members, edge()]:
        fed.join(member)
        fed.watch_begins(member.name)
    fed.propose("edge", PLACEMENT, adapter(0))
    return fed


def half(role: Role, name: str, submission: str = "1", version: int = 0, **more: Any) -> Half:
    return Half(submission, name, role, version, **more)


def submit(fed: Federation, name: str, state: AdapterState, submission: str = "1", version: int = 0, cut: int = 1) -> None:
    """Both halves of an update."""
    fed.submit(half("device", name, submission, version), device_half(state, cut))
    fed.submit(half("edge", name, submission, version), edge_half(state, cut))


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def no_more_files() -> Iterator[None]:
    """Opening a file fails, as when the process has as many open as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def same(left: AdapterState, right: AdapterState) -> bool:
    """Whether two adapters are equal to the bit."""
    return left.keys() == right.keys() and all(left[key].tobytes() == right[key].tobytes() for key in left)


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in the metrics."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def aggregations(folder: Path) -> list[dict[str, Any]]:
    """What the metrics tell of the aggregations."""
    return told(folder, "aggregate")
