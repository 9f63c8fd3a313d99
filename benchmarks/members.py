"""Federation server, edge server and device as processes of their own, for benchmarks that need the real daemons."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.cluster.metrics import read_events
from sfl.cluster.plan import free_addresses

SFL = [sys.executable, "-m", "sfl.cli.main"]


@dataclass(frozen=True)
class Servers:
    """A federation server and an edge server that run, and where."""

    fed: str
    edge: str
    folder: Path


@contextlib.contextmanager
def servers(folder: Path, model: Path, devices: int = 1, edge_flags: tuple[str, ...] = ()) -> Iterator[Servers]:
    """Start both for one run of `devices` devices; they end with the block. Logs and metrics go to `folder`."""
    folder.mkdir(parents=True)
    fed, edge = free_addresses(2)
    flags = ["--listen", fed, "--devices", str(devices), "--strategy.name", "fedavg", "--strategy.local-steps", "1000"]
    commands = {
        "fed": ["fed", *flags],
        "edge": ["edge", "--listen", edge, "--federation", fed, "--model", str(model), *edge_flags],
    }
    with contextlib.ExitStack() as stack:
        for name, command in commands.items():
            log = stack.enter_context((folder / f"{name}.txt").open("w"))
            child = subprocess.Popen([*SFL, *command, "--out", str(folder / name)], stdout=log, stderr=log)
            stack.callback(child.wait, 60)
            stack.callback(child.terminate)
        yield Servers(fed, edge, folder)


def device_command(servers: Servers, model: str, out: Path, data: Path, **settings: object) -> list[str]:
    """`sfl device` with `settings` (underscores for hyphens) against `servers`, as where memory is short."""
    fixed = {"name": "device", "model": model, "federation": servers.fed, "edge": servers.edge, "out": out, "data.path": data}
    flags = {**fixed, **settings}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [*SFL, "device", "--tight-memory", *words]


def end_of(out: Path) -> dict[str, Any]:
    """The last report of a daemon; ends this process with its log where it has none."""
    events = [event for event in read_events(out / "metrics.jsonl") if event["event"] == "end"]
    if not events:
        sys.exit(f"{out} has no end: see its log beside it")
    return events[-1]
