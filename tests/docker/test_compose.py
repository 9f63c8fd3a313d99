"""The cluster's files, without an engine: what every container must have, and settings that the daemons take."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from typing import Any

import pytest
import yaml

from sfl.cli.load_settings import load
from sfl.settings import DaemonSettings, DeviceSettings, EdgeSettings, FedSettings
from tests.docker.files import DOCKER, ROOT, asked_for, compose, daemons, environment, ignored, queries, services, sources

MODELS: dict[str, type[DaemonSettings]] = {"fed": FedSettings, "edge": EdgeSettings, "device": DeviceSettings}
ALL = {**services(), **services("watching.yml")}
ENDS = {"certs", "status"}  # by itself, so nobody asks how it is


def settings_of(name: str) -> Any:
    """Settings that the daemon of a service comes to, in its container."""
    role, service = daemons()[name]
    command, _, file = service["command"]
    assert command == role
    return load(MODELS[role], DOCKER / "settings" / file.rpartition("/")[2], environment=environment(service))


@pytest.mark.parametrize("name", ALL)
def test_a_container_may_little(name: str) -> None:
    service = ALL[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert service["pids_limit"] > 0
    assert service["mem_limit"]
    assert not {"privileged", "devices", "pid", "ipc"} & set(service)
    user, network = service["user"].split(":")[0], service.get("network_mode")
    assert (user != "0" and network is None) or (name == "certs" and network == "none")
    assert service["healthcheck"] == {"disable": True} if name in ENDS else service["healthcheck"]["test"][0] == "CMD"


def test_only_watchers_are_reached_from_outside_and_only_from_this_machine() -> None:
    ports = {name: service["ports"] for name, service in ALL.items() if "ports" in service}
    assert set(ports) == {"prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for each in ports.values() for port in each)


def test_images_of_others_have_a_version() -> None:
    for name in services("watching.yml"):
        assert re.fullmatch(r"\$\{\w+:-[a-z/]+:v?\d+\.\d+\.\d+\}", ALL[name]["image"])


def test_each_node_has_its_own_keys_alone() -> None:
    mounted = Counter(source for name, service in ALL.items() if name != "certs" for source, _ in sources(service))
    certs = [source for source in mounted if source.endswith("-certs")]
    assert {source: mounted[source] for source in certs} == {f"{name}-certs": 1 for name in [*daemons(), "operator"]}
    assert "authority" not in mounted
    words = environment(ALL["certs"])["NODES"].split()
    made = {word.partition("=")[0] for word in words if not word.startswith("--")}
    assert made == {*daemons(), "operator"}
    assert {target for _, target in sources(ALL["certs"]) if target.startswith("/nodes/")} == {f"/nodes/{name}" for name in made}


def test_state_outlives_its_container() -> None:
    for name in daemons():
        state = [source for source, target in sources(ALL[name]) if target == "/var/lib/sfl"]
        assert state == [f"{name}-state"]
        assert state[0] in compose()["volumes"]
        assert str(settings_of(name).out) == "/var/lib/sfl"


def test_settings_are_those_of_one_federation() -> None:
    settings = {name: settings_of(name) for name in daemons()}
    devices = {name: each for name, each in settings.items() if isinstance(each, DeviceSettings)}
    assert all(each.name == name and each.tls.folder is not None for name, each in settings.items())
    assert settings["fed"].devices == len(devices)
    for each in settings.values():
        if not isinstance(each, FedSettings):
            assert each.federation == f"fed:{settings['fed'].listen.rpartition(':')[2]}"
    for device in devices.values():
        edge, port = device.edge.split(":")
        assert settings[edge].listen.rpartition(":")[2] == port
    assert {device.edge for device in devices.values()} == {f"{name}:7301" for name in settings if name.startswith("edge")}
    assert len({device.cut for device in devices.values()}) == 4


def test_what_two_nodes_may_have_in_flight_is_half_of_a_servers_memory_at_most() -> None:
    units = {"b": 1, "m": 2**20, "g": 2**30}
    for name, (role, service) in daemons().items():
        if role != "device":
            size, unit = re.fullmatch(r"(\d+)([bmg])", service["mem_limit"]).groups()  # type: ignore[union-attr]
            assert 2 * settings_of(name).limits.in_flight_mb * 1e6 <= int(size) * units[unit] / 2, name


def test_devices_have_limits_as_small_boards_do() -> None:
    devices = [service for role, service in daemons().values() if role == "device"]
    limits = [service["mem_limit"] for service in devices]
    assert [service["memswap_limit"] for service in devices] == limits  # no swap
    assert max(int(limit.removesuffix("b")) for limit in limits) == 512 * 10**6
    assert len(set(limits)) > 2


def test_prometheus_asks_every_daemon_where_it_shows_its_figures() -> None:
    content = yaml.safe_load((DOCKER / "watching" / "prometheus.yml").read_text(encoding="utf-8"))
    groups = content["scrape_configs"][0]["static_configs"]
    told = {group["labels"]["node"]: (group["targets"], group["labels"]["kind"]) for group in groups}
    ports = {name: settings_of(name).metrics_listen.rpartition(":")[2] for name in daemons()}
    assert told == {name: ([f"{name}:{ports[name]}"], role) for name, (role, _) in daemons().items()}


def test_grafana_asks_for_what_the_issue_is_about() -> None:
    wanted = {
        "sfl_loss",
        "sfl_version",
        "sfl_bytes_total",
        "process_resident_memory_bytes",
        "sfl_submissions_total",
        "sfl_behind",
    }
    assert wanted <= asked_for()
    assert len(queries()) > 30


def test_no_secret_reaches_the_builder() -> None:
    patterns = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for path in (
        "certs/authority/key.pem",
        "certs/nodes/pi-1/node.pem",
        "sfl/key.pem",
        "docker/wheelhouse/key.pem",
        "docker/compose.yml",
        "out/fed/adapters/v0/adapter_model.safetensors",
        ".git/config",
        ".env",
        "docker/.env",
        ".venv/pyvenv.cfg",
        "flows.conn.log.labeled",
        "sfl/cli/__pycache__/main.pyc",
    ):
        assert ignored(path, patterns), path
    for path in (
        "pyproject.toml",
        "README.md",
        "sfl/cli/main.py",
        "docs/errors/SFL-603.md",
        "docker/install.sh",
        "docker/locks/fed.x86_64.txt",
    ):
        assert not ignored(path, patterns), path


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
@pytest.mark.parametrize("files", [("compose.yml",), ("compose.yml", "watching.yml")])
def test_docker_compose_reads_them(files: tuple[str, ...]) -> None:
    flags = [word for name in files for word in ("-f", str(DOCKER / name))]
    done = subprocess.run(
        ["docker-compose", *flags, "config", "--services"],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "SFL_DATA": "/data", "SFL_MODEL": "/model"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert {name for file in files for name in services(file)} - {"status"} <= set(done.stdout.split())
