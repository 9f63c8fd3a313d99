"""The README's "Separate machines", to the letter: its three files, each daemon on a machine (network namespace) of its own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sfl.adapters import peft_format
from sfl.data.generate import PROFILES, generate_log
from tests.daemons.environment import ENVIRONMENT
from tests.daemons.processes import sfl
from tests.metrics import events
from tests.tiny import save_tiny_model

README = Path(__file__).parents[2] / "README.md"
ADDRESSES = {"fed": "10.0.0.1", "edge": "10.0.0.2", "camera": "10.0.0.3", "hub": "10.0.0.4"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and iproute2"),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


@pytest.fixture
def machines() -> Iterator[dict[str, str]]:
    """A namespace for each machine, all on one switch, which is a namespace too; by machine its namespace."""
    mark = f"sfl{os.getpid()}"
    switch = f"{mark}-switch"
    names = {machine: f"{mark}-{machine}" for machine in ADDRESSES}
    try:
        for namespace in (switch, *names.values()):
            ip("netns", "add", namespace)
            ip("-n", namespace, "link", "set", "lo", "up")
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for port, (machine, namespace) in enumerate(names.items()):
            ip("-n", switch, "link", "add", f"port{port}", "type", "veth", "peer", "name", "eth0", "netns", namespace)
            ip("-n", switch, "link", "set", f"port{port}", "master", "br0", "up")
            ip("-n", namespace, "addr", "add", f"{ADDRESSES[machine]}/24", "dev", "eth0")
            ip("-n", namespace, "link", "set", "eth0", "up")
        yield names
    finally:
        for namespace in (switch, *names.values()):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip("netns", "del", namespace)


def readme_files() -> dict[str, str]:
    """The configuration files that the README shows, by name."""
    return dict(re.findall(r"^`(\w+\.toml)`.*?\n```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.M | re.S))


def test_the_readmes_three_files_train_across_four_machines(machines: dict[str, str], tmp_path: Path) -> None:
    files = readme_files()
    assert set(files) == {"fed.toml", "edge.toml", "device.toml"}
    save_tiny_model(tmp_path / "models" / "opt-350m", "opt")
    for index, profile in enumerate(("camera", "hub")):
        generate_log(tmp_path / f"{profile}.conn.log.labeled", 400, PROFILES[profile], seed=index)
    hub = files["device.toml"].replace("camera", "hub").replace("cut = 2", "cut = 1")
    for name, text in {"fed": files["fed.toml"], "edge": files["edge.toml"], "camera": files["device.toml"], "hub": hub}.items():
        (tmp_path / f"{name}.toml").write_text(text.replace("steps = 200", "steps = 30"), encoding="utf-8")

    roles = {"camera": "device", "hub": "device", "edge": "edge", "fed": "fed"}
    running = {}
    try:
        for machine, role in roles.items():  # the servers last: everybody waits for everybody
            command = ["ip", "netns", "exec", machines[machine], *sfl(role, "--config", f"{machine}.toml")]
            running[machine] = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT)
        for machine in ("camera", "hub"):
            assert running[machine].wait(timeout=120) == 0
        for machine in ("edge", "fed"):
            running[machine].terminate()
            assert running[machine].wait(timeout=30) == 0
    finally:
        for process in running.values():
            process.kill()
            process.wait()

    assert [event["steps"] for machine in ("camera", "hub") for event in events(tmp_path / "out" / machine, "end")] == [30, 30]
    newest = max((tmp_path / "out" / "fed" / "adapters").iterdir(), key=lambda path: int(path.name[1:]))
    assert int(newest.name[1:]) >= 1
    assert peft_format.read(newest)[1].lora.rank == 8
