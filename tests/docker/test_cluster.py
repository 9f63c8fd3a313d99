"""The cluster of docker/compose.yml on a real engine: images, and a run in which a device and an edge server are killed.

Prints what was seen. Needs an engine, the demo's model, and a filled docker/wheelhouse or a package index. SFL_STEPS sets how
long the run is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfl.data.generate import PROFILES, generate_log
from sfl.errors import ModelError
from sfl.fed_server.ledger import check
from sfl.fed_server.versions import version_numbers
from sfl.model.default import default_model
from tests.docker.files import ROLES, ROOT, asked_for, daemons, shown
from tests.metrics import events

pytestmark = pytest.mark.docker

TAG = "test"
STEPS = int(os.environ.get("SFL_STEPS", "80"))
LONGEST_S = 3600.0  # for anything: builds and imports share the machine with whoever else is there
DEVICES = [name for name, (role, _) in daemons().items() if role == "device"]
KILLED_DEVICE, KILLED_EDGE = "device-2", "edge-2"
FETCH = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:9300/metrics', timeout=60).read().decode())"


def docker(*words: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=LONGEST_S)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout.strip()


def size_of(image: str) -> int:
    """Bytes."""
    return int(docker("image", "inspect", "-f", "{{.Size}}", image))


class Cluster:
    """A cluster with a project name of its own."""

    def __init__(self, data: Path, model: Path) -> None:
        self.variables = {
            "COMPOSE_PROJECT_NAME": f"sfl{uuid.uuid4().hex[:8]}",
            "SFL_TAG": TAG,
            "SFL_DATA": str(data),
            "SFL_MODEL": str(model),
            "SFL_STEPS": str(STEPS),
            "PYTHON": sys.executable,
        }
        self.containers: dict[str, str] = {}

    def sh(self, *words: str) -> str:
        """What docker/cluster.sh says."""
        done = subprocess.run(
            [ROOT / "docker" / "cluster.sh", *words],
            env={**os.environ, **self.variables},
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def up(self) -> None:
        self.sh("up")
        label = f"label=com.docker.compose.project={self.variables['COMPOSE_PROJECT_NAME']}"
        lines = docker("ps", "-a", "--filter", label, "--format", '{{.ID}} {{.Label "com.docker.compose.service"}}')
        self.containers = {line.split()[1]: line.split()[0] for line in lines.splitlines()}

    def state(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(docker("inspect", "-f", "{{json .State}}", self.containers[name]))
        return found

    def events(self, name: str, kind: str) -> list[dict[str, Any]]:
        """What a daemon that runs has reported so far."""
        text = docker("exec", self.containers[name], "cat", "/var/lib/sfl/metrics.jsonl", check=False)
        return [event for event in map(json.loads, text.splitlines()) if event["event"] == kind]

    def until(self, look: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + LONGEST_S
        while not look():
            for name in daemons():
                state = self.state(name)
                assert not state["OOMKilled"], f"{name} had too little memory, while waiting for {what}"
                assert state["Status"] != "restarting" or name == KILLED_EDGE, f"{name}: {self.log(name)}"
            assert time.monotonic() < end, f"{what} was not seen; {self.log('fed')}"
            time.sleep(2)

    def log(self, name: str) -> str:
        done = subprocess.run(["docker", "logs", "--tail", "30", self.containers[name]], capture_output=True, text=True)
        return done.stdout + done.stderr

    def state_folder(self, name: str, to: Path) -> Path:
        """A copy of what a daemon keeps."""
        docker("cp", f"{self.containers[name]}:/var/lib/sfl", str(to / name))
        return to / name


@pytest.fixture(scope="module")
def images() -> dict[str, int]:
    """Sizes in bytes, with that of the base."""
    if subprocess.run(["docker", "info"], capture_output=True).returncode:
        pytest.skip("there is no Docker engine (DOCKER_HOST)")
    started = time.monotonic()
    subprocess.run([ROOT / "docker" / "cluster.sh", "images"], check=True, env={**os.environ, "SFL_TAG": TAG}, timeout=LONGEST_S)
    print(f"\nimages after {time.monotonic() - started:.0f} s")
    return {"base": size_of("python:3.11-slim-bookworm"), **{role: size_of(f"sfl-{role}:{TAG}") for role in ROLES}}


@pytest.fixture
def cluster(images: dict[str, int], tmp_path: Path) -> Iterator[Cluster]:
    try:
        model = default_model("classification")
    except ModelError as error:
        pytest.skip(str(error))
    for number, device in enumerate(DEVICES):
        folder = tmp_path / "data" / device
        folder.mkdir(parents=True)
        generate_log(folder / "flows.log", 400, PROFILES[list(PROFILES)[number % len(PROFILES)]], number)
    made = Cluster(tmp_path / "data", model)
    try:
        yield made
    finally:
        made.sh("down", "--volumes", "--timeout", "20")


def test_the_federation_server_is_small_and_knows_no_torch(images: dict[str, int]) -> None:
    for name, size in images.items():
        print(f"{name:>7}: {size / 1e6:5.0f} MB, {(size - images['base']) / 1e6:4.0f} over its base")
    assert images["fed"] - images["base"] <= 200e6
    assert images["device"] <= images["edge"]
    look = "import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ('torch', 'transformers', 'peft'))))"
    docker("run", "--rm", "--entrypoint", "python", f"sfl-fed:{TAG}", "-c", look)


def test_nobody_is_root_and_there_are_no_keys(images: dict[str, int]) -> None:
    look = """
import os, pathlib
found = [path for folder in ("/opt/sfl/lib", "/certs", "/var/lib/sfl", "/home", "/root", "/build", "/src", "/tmp")
         for path in pathlib.Path(folder).rglob("*")
         if path.suffix in (".key", ".pem") and b"PRIVATE KEY" in path.read_bytes()]
print(os.getuid(), found)
"""
    for role in ROLES:
        assert docker("run", "--rm", "--entrypoint", "python", f"sfl-{role}:{TAG}", "-c", look) == "10001 []"


def test_a_run_in_which_a_device_and_an_edge_server_are_killed(cluster: Cluster, tmp_path: Path) -> None:
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {what}", flush=True)

    cluster.up()
    tell("all containers are started")
    cluster.until(lambda: all(cluster.events(name, "step") for name in DEVICES), "a step of each device")
    tell("all devices train")
    assert set(docker("exec", cluster.containers["device-1"], "ls", "/certs").split()) == {
        "ca.pem", "key.pem", "node.pem", "revoked.crl",
    }  # fmt: skip
    pages = [docker("exec", cluster.containers[name], "python", "-c", FETCH) for name in daemons()]
    assert asked_for() - shown(pages) == set()  # no panel of the dashboard asks for what no daemon has

    cluster.until(lambda: len(cluster.events(KILLED_DEVICE, "step")) >= STEPS // 6, "steps before a kill")
    docker("kill", cluster.containers[KILLED_DEVICE])
    assert cluster.state(KILLED_DEVICE)["ExitCode"] == 137
    docker("start", cluster.containers[KILLED_DEVICE])
    tell(f"{KILLED_DEVICE} was killed, and started again")

    cluster.until(lambda: len(cluster.events("device-3", "step")) >= STEPS // 3, "steps before a kill")
    before = int(docker("inspect", "-f", "{{.RestartCount}}", cluster.containers[KILLED_EDGE]))
    docker("exec", cluster.containers[KILLED_EDGE], "sh", "-c", "kill -9 $(cat /proc/1/task/1/children)")
    cluster.until(
        lambda: int(docker("inspect", "-f", "{{.RestartCount}}", cluster.containers[KILLED_EDGE])) > before, "a restart"
    )
    tell(f"{KILLED_EDGE} was killed, and the engine has started it again")

    table = cluster.sh("status")
    assert all(name in table for name in (*DEVICES, "edge-1", KILLED_EDGE)), table
    cluster.until(lambda: all(cluster.state(name)["Status"] == "exited" for name in DEVICES), "the end of all devices")
    tell("all devices are done")
    (states := tmp_path / "states").mkdir()
    health = {name: cluster.state(name)["Health"]["Status"] for name in ("fed", "edge-1", KILLED_EDGE)}
    for name in DEVICES:
        assert cluster.state(name)["ExitCode"] == 0, cluster.log(name)
        folder = cluster.state_folder(name, states)
        steps, end = events(folder, "step"), events(folder, "end")[-1]
        limit = int(docker("inspect", "-f", "{{.HostConfig.Memory}}", cluster.containers[name]))
        resumes = [event["step"] for event in events(folder, "resume")]
        print(
            f"{name}: cut {events(folder, 'start')[-1]['cut']}, {end['steps']} steps, loss {steps[0]['loss']:.2f} to"
            f" {steps[-1]['loss']:.2f}, peak {end['peak_rss_mb']:.0f} of {limit / 1e6:.0f} MB, {end['submissions']} submissions,"
            f" went on from steps {resumes}"
        )
        assert steps[-1]["step"] == end["steps"] == STEPS
        assert end["peak_rss_mb"] * 1e6 < limit
        assert [event for event in events(folder, "eval") if event["split"] == "test"]
        if name in (
            KILLED_DEVICE,
            "device-1",
        ):  # the other edge server's devices go back only where it had not kept their last step
            assert len(resumes) == (name == KILLED_DEVICE)

    fed = cluster.state_folder("fed", states)
    balance = check(fed)
    newest = max(version_numbers(fed / "adapters"))
    print(f"newest version {newest}; {balance}")
    told = {name: events(states / name, "end")[-1]["submissions"] for name in DEVICES}
    assert balance.problems == []
    assert balance.accepted == balance.counted == sum(told.values())
    assert newest >= 1
    assert health == {"fed": "healthy", "edge-1": "healthy", KILLED_EDGE: "healthy"}
