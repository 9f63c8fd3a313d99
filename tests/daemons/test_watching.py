"""A federation of real daemons, watched while it trains: figures, health, status and logs."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from sfl.cli.main import app
from sfl.cluster.plan import free_addresses
from sfl.errors import UnreachableError
from sfl.settings import StrategySettings
from tests.daemons.processes import WAIT_S, Daemon, Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all
from tests.docker.files import asked_for, shown
from tests.tiny import save_tiny_model

STEPS = 5000  # more than anyone waits for


def page(address: str, path: str) -> str:
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def eventually(look: Callable[[], Any], daemons: Daemons) -> Any:
    """What `look` gives, once that is something."""
    deadline = time.monotonic() + WAIT_S
    while not (found := look()):
        for daemon in daemons.by_name.values():
            assert daemon.process.poll() is None, daemon.log
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def sfl(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_a_federation_is_seen_from_outside(tmp_path: Path) -> None:
    addresses = dict(zip(("fed", "edge", "device-1", "device-2"), free_addresses(4), strict=True))
    model = save_tiny_model(tmp_path / "model", "bert")
    devices = [
        settings.model_copy(update={"metrics_listen": addresses[settings.name], "report_s": 0.2, "log_format": "json"})
        for settings in several_devices(tmp_path, model, (1, 2), steps=STEPS)
    ]
    edge = edge_settings("edge", devices[0], metrics_listen=addresses["edge"], report_s=0.2)
    with Daemons(tmp_path / "run", forked=True) as daemons:
        strategy = StrategySettings(name="fedavg", local_steps=10)
        start_all(daemons, strategy, [edge], devices, metrics_listen=addresses["fed"])
        federation, edge_address = (setting(daemons["device-1"], name) for name in ("federation", "edge"))

        def training() -> dict[str, Any] | None:
            try:
                found: dict[str, Any] = json.loads(sfl("status", "--federation", federation, "--json"))
            except UnreachableError:  # the federation server is starting
                return None
            told = {member["name"]: member["report"] for member in found["members"] if member["report"]}
            stepping = [told[name]["steps"] >= 5 for name in ("device-1", "device-2") if name in told]
            sessions = len(told["edge"]["sessions"]) if "edge" in told else 0
            return found if len(stepping) == 2 and all(stepping) and sessions == 2 else None

        status = eventually(training, daemons)
        members = {member["name"]: member for member in status["members"]}
        assert (status["joined"], status["expected"], members["device-2"]["cut"]) == (2, 2, 2)
        for name in ("device-1", "device-2"):
            report = members[name]["report"]
            assert 0 < report["edge_wait_s"] <= report["step_s"] < 10
            assert report["planned_steps"] == STEPS
            assert report["memory_bytes"] > 50e6
            assert report["bytes_sent"] > 1000
            assert (members[name]["edge"], members[name]["presence"]) == ("edge", "present")
        table = sfl("status", "--federation", federation)
        assert "device-1" in table
        assert f"/{STEPS}" in table

        for name, lines in {
            "device-1": ['sfl_device_steps_total{device="device-1"}', 'sfl_bytes_total{direction="sent",peer="federation"}'],
            "edge": ["sfl_sessions 2.0", 'sfl_edge_steps_total{device="device-2"}', 'peer="devices"'],
            "fed": ['sfl_uploads_total{device="device-1"}', 'sfl_members{role="device",state="present"} 2.0', "sfl_version "],
        }.items():
            text = page(addresses[name], "/metrics")
            assert [line for line in lines if line not in text] == [], name
            assert json.loads(page(addresses[name], "/healthz"))["ready"] is True
        assert asked_for() - shown(page(address, "/metrics") for address in addresses.values()) == set()
        assert sfl("health", federation) == "serving\n"
        assert sfl("health", edge_address, "--service", "sfl.v1.SplitTraining") == "serving\n"

        for settings in devices:
            assert daemons[settings.name].stop() == 0, daemons[settings.name].log
        told = json.loads(sfl("status", "--federation", federation, "--json"))["members"]
        assert {member["name"]: member["presence"] for member in told if member["role"] == "DEVICE"} == {
            "device-1": "stopped",
            "device-2": "stopped",
        }
        assert 'sfl_members{role="device",state="stopped"} 2.0' in page(addresses["fed"], "/metrics")

        assert daemons["edge"].stop() == 0, daemons["edge"].log
        moved = daemons["device-1"].events("step")[-1]["bytes_sent"]

        def reported(daemon: Daemon) -> int | None:
            found = json.loads(sfl("status", "--federation", federation, "--json"))["members"]
            report = next(member["report"] for member in found if member["name"] == daemon.name)
            return None if report["ended"] else int(report["bytes_sent"])

        again = daemons.again("device-1")  # it waits for its edge server, and makes no step
        again.until(lambda daemon: reported(daemon) is not None)
        assert (reported(again) or 0) >= moved, "its bytes are those of its run"
        assert again.stop() == 0, again.log
        assert daemons["fed"].stop() == 0
        lines = [json.loads(line) for line in daemons["device-1"].log.splitlines() if line.startswith("{")]
        assert len(lines) > 3
        assert {line["daemon"] for line in lines} == {"device-1"}


def setting(daemon: Daemon, name: str) -> str:
    """A setting that the daemon was started with."""
    lines = (daemon.out / "config.toml").read_text(encoding="utf-8").splitlines()
    return next(line.partition(" = ")[2].strip('"') for line in lines if line.startswith(f"{name} = "))
