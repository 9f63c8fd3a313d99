"""What a user can get wrong: each daemon says so in one line, exits with another code than 0, and does so soon."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from sfl.cluster.plan import free_addresses
from sfl.settings import DeviceSettings, FedSettings
from tests.daemons.forked import Forked
from tests.daemons.processes import WAIT_S, Daemons, Role, plain
from tests.daemons.runs import device_settings, edge_settings
from tests.flows import write_texts
from tests.tiny import save_tiny_model

SOON_S = 20.0  # far below every waiting time that a case does not set


@dataclass(frozen=True)
class World:
    """Files, addresses and servers for all cases."""

    folder: Path
    taken: str  # an address that somebody else listens on
    absent: str  # one that nobody listens on
    one_class: str  # a federation server for two devices
    daemons: Daemons  # `fed` and `edge`, one federation for one device
    device: DeviceSettings  # fits all of these

    def wait_for_edge(self) -> None:
        """Until the edge server has joined, first of all, so that devices are compared with it."""
        self.daemons["fed"].until(lambda fed: fed.events("join"))


@dataclass(frozen=True)
class Case:
    """A daemon that differs from the good device or edge server, the exit code it must have, and what it must say."""

    role: Role
    changes: dict[str, Any]
    code: int
    says: tuple[str, ...]
    with_edge: bool = False  # whether the case needs the edge server


def port_in_use(role: Role, world: World) -> Case:
    changes = {"devices": 1} if role == "fed" else {}
    says = (f"cannot listen on {world.taken}: ", "in use", "choose another with `listen`")
    return Case(role, {**changes, "listen": world.taken}, 1, says)  # which another moment may change


def one_class(name: str, world: World) -> Case:
    data = {"path": str(write_texts(world.folder / f"{name}.txt", 60, labels=("Benign",)))}
    says = ("all devices together have seen only one class, 'Benign'", "`labels`")
    return Case("device", {"data": data, "federation": world.one_class}, 1, says)


def log_without_rows(world: World) -> Case:
    log = world.folder / "conn.log.labeled"
    log.write_text("#separator \\x09\n#fields\tts\tproto\tservice\tduration\tlabel\n#close\t2020-01-01\n")
    return Case("device", {"data": {"path": str(log)}}, 2, (f"{log} holds a header but no rows",))


def no_weights(world: World) -> Case:
    model = shutil.copytree(world.device.model, world.folder / "no-weights", ignore=shutil.ignore_patterns("*.safetensors"))
    return Case("device", {"model": str(model)}, 2, (f"'{model}' has no weights in safetensors",))


def unknown_family(world: World) -> Case:
    model = Path(shutil.copytree(world.device.model, world.folder / "unknown-family"))
    (model / "config.json").write_text(json.dumps({"model_type": "clip"}))
    return Case("device", {"model": str(model)}, 2, ("a model of type 'clip' cannot be cut", "opt, ", "bert"))


def other_model(world: World) -> Case:
    model = save_tiny_model(world.folder / "other-model", "bert", seed=1)
    says = ("the federation server refused: ", "another base model than edge server 'edge': fingerprint ")
    return Case("device", {"model": str(model)}, 1, says, with_edge=True)


CASES: dict[str, Callable[[World], Case]] = {
    "unknown setting": lambda world: Case(
        "device",
        {"optimizer": {"learnig_rate": 0.1}},
        2,
        ("unknown setting 'optimizer.learnig_rate' in config.toml: did you mean optimizer.learning_rate?",),
    ),
    "cut 0": lambda world: Case(
        "device", {"cut": 0}, 2, ("cut = 0 in config.toml: a cut is a number of blocks, 1 or more, or auto",)
    ),
    "port in use, federation server": lambda world: port_in_use("fed", world),
    "port in use, edge server": lambda world: port_in_use("edge", world),
    "one class, first device": lambda world: one_class("first", world),
    "one class, second device": lambda world: one_class("second", world),
    "cut L": lambda world: Case("device", {"cut": 4}, 2, ("this model has 4 blocks, so a cut is between 1 and 3",)),
    "no such data": lambda world: Case(
        "device", {"data": {"path": str(world.folder / "none.log")}}, 2, (f"{world.folder / 'none.log'}: there is no such file",)
    ),
    "log without rows": log_without_rows,
    "too long": lambda world: Case(
        "device", {"max_length": 129}, 2, ("a maximum length of 129 tokens is more than this model takes: at most 128",)
    ),
    "no weights": no_weights,
    "unknown family": unknown_family,
    "no federation server": lambda world: Case(
        "device",
        {"federation": world.absent, "wait_s": 1},
        1,
        (f"the federation server at {world.absent} did not answer within 1 s: is it running",),
    ),
    "other base model": other_model,
    "other LoRA rank": lambda world: Case(
        "device",
        {"lora": {"rank": 8, "alpha": 8}},
        1,
        ("the federation server refused: ", "other LoRA settings than edge server 'edge': rank 8 against 4"),
        with_edge=True,
    ),
    "no edge server": lambda world: Case(
        "device",
        {"edge": world.absent, "wait_s": 1},
        1,
        (f"the edge server at {world.absent} did not answer within 1 s: is it running",),
        with_edge=True,
    ),
}


@dataclass(frozen=True)
class Ended:
    """A daemon that has ended by itself."""

    case: Case
    code: int | None
    stdout: str
    stderr: str
    seconds: float


def run(world: World, name: str) -> Ended:
    case = CASES[name](world)
    if case.with_edge:
        world.wait_for_edge()
    good = {"fed": {}, "edge": plain(edge_settings("edge", world.device)), "device": plain(world.device)}[case.role]
    out = world.folder / "ended" / name
    out.mkdir(parents=True)
    config, stdout, stderr = (out / file for file in ("config.toml", "stdout", "stderr"))
    config.write_text(tomli_w.dumps({**good, "name": name, **case.changes, "out": str(out)}), encoding="utf-8")
    started = time.monotonic()
    process = Forked([case.role, "--config", str(config)], stdout, stderr)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(WAIT_S)
    process.kill()
    return Ended(case, process.returncode, stdout.read_text(), stderr.read_text(), time.monotonic() - started)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("bad-input")
    model = save_tiny_model(folder / "model", "bert")
    fed, one_class, edge, absent = free_addresses(4)
    device = device_settings("device", model, write_texts(folder / "texts.txt", 60), federation=fed, edge=edge)
    with Daemons(folder / "servers", forked=True) as daemons, socket.create_server(("127.0.0.1", 0)) as server:
        daemons.start("fed", FedSettings(name="fed", listen=fed, devices=1))
        daemons.start("fed", FedSettings(name="fed-one-class", listen=one_class, devices=2))
        daemons.start("edge", edge_settings("edge", device, listen=edge, federation=fed))
        yield World(folder, f"127.0.0.1:{server.getsockname()[1]}", absent, one_class, daemons, device)


@pytest.fixture(scope="module")
def ended(world: World) -> Iterator[dict[str, Future[Ended]]]:
    """All cases under way, as many at once as there are cores."""
    with ThreadPoolExecutor(max_workers=max(2, os.cpu_count() or 1)) as pool:
        yield {name: pool.submit(run, world, name) for name in CASES}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CASES)
def test_bad_input_ends_in_one_line_and_soon(ended: dict[str, Future[Ended]], name: str) -> None:
    found = ended[name].result()
    stderr = found.stderr
    assert found.code == found.case.code, stderr
    assert found.stdout == "" and "Traceback" not in stderr
    error = stderr.splitlines()[-1]
    assert re.match(r"error SFL-\d{3}: ", error) and len(re.findall("^error", stderr, re.MULTILINE)) == 1, stderr
    for part in found.case.says:
        assert part in error
    assert found.seconds < SOON_S
