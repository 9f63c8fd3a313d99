"""The README's "Separate machines", to the letter: its certificates and its three files, each daemon on a machine of its own.

A machine is a network namespace and a folder.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from sfl.adapters import peft_format
from sfl.data.generate import PROFILES, generate_log
from tests.daemons.environment import ENVIRONMENT
from tests.daemons.machines import Machines, needs_root
from tests.daemons.processes import sfl
from tests.metrics import events
from tests.tiny import save_tiny_model

README = Path(__file__).parents[2] / "README.md"

pytestmark = [pytest.mark.slow, needs_root]


def readme_files() -> dict[str, str]:
    """The configuration files that the README shows, by name."""
    return dict(re.findall(r"^`(\w+\.toml)`.*?\n```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.M | re.S))


def readme_command(begins: str) -> list[str]:
    """The command line that the README shows."""
    (line,) = re.findall(rf"^{begins} .*$", README.read_text(encoding="utf-8"), re.M)
    return sfl(*shlex.split(line, comments=True)[1:])


def furnish(folder: Path) -> None:
    """What the README asks for: on each machine its file and its certificates; models and data where they are needed."""
    files = readme_files()
    assert set(files) == {"fed.toml", "edge.toml", "device.toml"}
    subprocess.run(readme_command("sfl certs make"), cwd=folder, env=ENVIRONMENT, check=True)
    hub = files["device.toml"].replace("camera", "hub").replace("cut = 2", "cut = 1")
    texts = {"fed": files["fed.toml"], "edge": files["edge.toml"], "camera": files["device.toml"], "hub": hub}
    for machine, text in texts.items():
        (folder / machine).mkdir()
        (folder / machine / f"{machine}.toml").write_text(text.replace("steps = 200", "steps = 30"), encoding="utf-8")
        node = "edge-1" if machine == "edge" else machine
        shutil.copytree(folder / "certs" / "nodes" / node, folder / machine / "certs")
        if machine != "fed":
            save_tiny_model(folder / machine / "models" / "opt-350m", "opt")
    for index, profile in enumerate(("camera", "hub")):
        generate_log(folder / profile / f"{profile}.conn.log.labeled", 400, PROFILES[profile], seed=index)


def test_the_readmes_files_train_across_four_machines_and_a_stranger_gets_nothing(machines: Machines, tmp_path: Path) -> None:
    furnish(tmp_path)
    stranger = tmp_path / "camera" / "stranger.toml"  # who has no certificate, and knows how to go without
    text = (tmp_path / "camera" / "camera.toml").read_text(encoding="utf-8")
    stranger.write_text(
        text.replace('folder = "certs"', "plaintext = true").replace("out/camera", "out/stranger"), encoding="utf-8"
    )

    roles = {"camera": "device", "hub": "device", "edge": "edge", "fed": "fed"}
    running = {}
    try:
        for machine, role in roles.items():  # the servers last: everybody waits for everybody
            command = [*machines.command(machine), *sfl(role, "--config", f"{machine}.toml")]
            running[machine] = subprocess.Popen(command, cwd=tmp_path / machine, env=ENVIRONMENT)
        refused = subprocess.run(
            [*machines.command("camera"), *sfl("device", "--config", "stranger.toml", "--name", "stranger")],
            cwd=tmp_path / "camera",
            env=ENVIRONMENT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert refused.returncode == 1  # as the other side may be mended in the meantime
        assert "the federation server at 10.0.0.1:7300 wants TLS" in refused.stderr
        for machine in ("camera", "hub"):
            assert running[machine].wait(timeout=120) == 0
        command = [*machines.command("hub"), *readme_command("sfl status")]  # with the certificates of the machine that made them
        shown = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
        assert shown.returncode == 0 and "finished" in shown.stdout and "30/30" in shown.stdout, shown
        for machine in ("edge", "fed"):
            running[machine].terminate()
            assert running[machine].wait(timeout=30) == 0
    finally:
        for process in running.values():
            process.kill()
            process.wait()

    done = [event["steps"] for machine in ("camera", "hub") for event in events(tmp_path / machine / "out" / machine, "end")]
    assert done == [30, 30]
    newest = max((tmp_path / "fed" / "out" / "fed" / "adapters").iterdir(), key=lambda path: int(path.name[1:]))
    assert int(newest.name[1:]) >= 1
    assert peft_format.read(newest)[1].lora.rank == 8
