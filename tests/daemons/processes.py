"""Real daemons as child processes, one folder each; none outlives its test."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import tomli_w

from sfl.settings import DaemonSettings
from tests.daemons.environment import ENVIRONMENT
from tests.daemons.forked import Forked
from tests.metrics import events

Role = Literal["fed", "edge", "device"]

WAIT_S = 60.0  # for anything that a healthy daemon does; many times what it takes


def sfl(*arguments: str) -> list[str]:
    """The command line of `sfl`."""
    return [sys.executable, "-m", "sfl.cli.main", *arguments]


def plain(settings: DaemonSettings) -> dict[str, Any]:
    """Settings as a configuration file holds them."""
    return settings.model_dump(mode="json", exclude_none=True)


@dataclass
class Daemon:
    """A daemon that was started. `out` holds its configuration, metrics and `log.txt` (stdout and stderr)."""

    name: str
    out: Path
    process: subprocess.Popen[bytes] | Forked
    arguments: list[str]

    @property
    def log(self) -> str:
        return (self.out / "log.txt").read_text(encoding="utf-8")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What it has reported so far."""
        return events(self.out, kind) if (self.out / "metrics.jsonl").is_file() else []

    def wait(self, timeout_s: float = WAIT_S) -> int:
        """Its exit code, once it has ended by itself."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended after {timeout_s:g} s; its log:\n{self.log}") from None

    def stop(self) -> int:
        """Its exit code after SIGTERM."""
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        """SIGKILL, if it still runs."""
        self.process.kill()
        self.process.wait()

    def until(self, ready: Callable[[Daemon], object], timeout_s: float = WAIT_S) -> None:
        """Return once `ready(self)` holds; it must while the daemon runs."""
        deadline = time.monotonic() + timeout_s
        while not ready(self):
            assert self.process.poll() is None, f"{self.name} ended with {self.process.returncode}; its log:\n{self.log}"
            assert time.monotonic() < deadline, f"{self.name} did not get there in {timeout_s:g} s; its log:\n{self.log}"
            time.sleep(0.05)


class Daemons:
    """Starts daemons in folders below `folder`; leaving the `with` block kills those that still run.

    With `forked` they are processes that find torch imported: where it does not matter how a daemon starts, that is faster. Else
    `before`, by a daemon's name, stands before its command line.
    """

    def __init__(self, folder: Path, forked: bool = False, before: Mapping[str, Sequence[str]] | None = None) -> None:
        self.folder = folder
        self._forked = forked
        self._before = before or {}
        self.by_name: dict[str, Daemon] = {}

    def __getitem__(self, name: str) -> Daemon:
        return self.by_name[name]

    def start(self, role: Role, settings: DaemonSettings | Mapping[str, Any]) -> Daemon:
        """Start `sfl ROLE --config FILE`; its `out` is the folder of its name, whatever the settings say."""
        values = plain(settings) if isinstance(settings, DaemonSettings) else dict(settings)
        out = self.folder / str(values["name"])
        out.mkdir(parents=True)
        config = out / "config.toml"
        config.write_text(tomli_w.dumps({**values, "out": str(out)}), encoding="utf-8")
        return self._run(out, [role, "--config", str(config)])

    def again(self, name: str) -> Daemon:
        """Start one that has ended as it was started before; its log goes on."""
        ended = self.by_name[name]
        assert ended.process.poll() is not None, f"{name} still runs"
        return self._run(ended.out, ended.arguments)

    def _run(self, out: Path, arguments: list[str]) -> Daemon:
        process = self._process(out.name, arguments, out / "log.txt")
        daemon = self.by_name[out.name] = Daemon(out.name, out, process, arguments)
        return daemon

    def _process(self, name: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes] | Forked:
        log.touch()
        if self._forked:
            return Forked(arguments, log, log)
        command = [*self._before.get(name, ()), *sfl(*arguments)]
        with log.open("ab") as file:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)

    def __enter__(self) -> Daemons:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for daemon in self.by_name.values():
            if daemon.process.poll() is None:
                daemon.process.send_signal(signal.SIGKILL)
        for daemon in self.by_name.values():
            daemon.process.wait()
