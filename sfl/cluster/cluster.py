"""A plan carried out: one process per daemon, each with its own configuration file, log and metrics."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import tomli_w

from sfl.cluster.plan import Plan
from sfl.cluster.supervisor import Program, Supervisor
from sfl.settings import DaemonSettings


class Cluster:
    """All daemons of a plan as local processes, under `plan.out`:

    `NAME/config.toml` (fit for `sfl fed|edge|device --config`), `NAME/log.txt` and `NAME/metrics.jsonl` for each daemon, and
    `adapters/v<N>` for the versions of the adapter. Free ports are picked here.
    """

    def __init__(self, plan: Plan) -> None:
        placed = plan.with_addresses()
        out = placed.out.absolute()
        self.out = out
        self.adapters = out / "adapters"
        self.fed = placed.fed.model_copy(update={"out": out / placed.fed.name, "adapters": self.adapters})
        self.edges = tuple(edge.model_copy(update={"out": out / edge.name}) for edge in placed.edges)
        self.devices = tuple(device.model_copy(update={"out": out / device.name}) for device in placed.devices)
        roles: list[tuple[str, DaemonSettings]] = [("fed", self.fed)]
        roles += [("edge", edge) for edge in self.edges]
        roles += [("device", device) for device in self.devices]
        self._supervisor = Supervisor([self._program(role, settings) for role, settings in roles], _environment())

    def run(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Start every daemon at once (they wait for each other), return when all devices are done and all daemons ended well.

        `on_tick` is called a few times a second. Raises `ChildError` when a daemon fails, `KeyboardInterrupt` after Ctrl-C or
        SIGTERM; no daemon is left running in any case.
        """
        for settings in (self.fed, *self.edges, *self.devices):
            settings.out.mkdir(parents=True, exist_ok=True)
            content = tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True))
            (settings.out / "config.toml").write_text(content, encoding="utf-8")
        self._supervisor.run(on_tick)

    def metrics(self, name: str) -> Path:
        """Where the daemon of this name reports."""
        return self.out / name / "metrics.jsonl"

    @staticmethod
    def _program(role: str, settings: DaemonSettings) -> Program:
        command = [sys.executable, "-m", "sfl.cli.main", role, "--config", str(settings.out / "config.toml")]
        return Program(settings.name, command, settings.out / "log.txt", ends=role == "device")


def _environment() -> dict[str, str]:
    """This process's, without settings that would override the configuration files."""
    kept = {name: value for name, value in os.environ.items() if not name.upper().startswith("SFL_")}
    return {**kept, "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
