"""What a federation server in the folder of an earlier one goes on from; see test_restart.py for ends at any moment."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import AdapterKey, device_half, total
from sfl.errors import AdapterError, RefusedError, SettingsError
from sfl.fed_server import server_state
from sfl.fed_server.aggregation import Aggregated, ServerState
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.status import StatusBoard
from sfl.fed_server.strategies import Moments
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import PLACEMENT, Clock, adapter, device, edge, federation, same, started, submit, told


def test_a_run_goes_on_from_the_newest_version_on_disk(tmp_path: Path) -> None:
    submit(started(tmp_path, [device("a")]), "a", adapter(1))
    fed = federation(tmp_path, 1)
    assert fed.version == 1 and fed.agreement is not None and fed.agreement.labels == ("benign", "scan")
    with pytest.raises(RefusedError, match="earlier run"):
        fed.join(device("a", model_fingerprint="other"))
    with pytest.raises(RefusedError, match="'worm'"):
        fed.join(device("a", labels=("worm",)))
    fed.join(edge())
    fed.join(device("a"))
    fed.join(edge("other"))
    assert fed.propose("edge", PLACEMENT, adapter(0)) and not fed.propose("other", PLACEMENT, adapter(9))
    submit(fed, "a", adapter(2), "2", version=1)
    assert same(fed.fetch("a", 2), total(total(adapter(0), adapter(1)), adapter(2)))
    with pytest.raises(SettingsError, match="choose another folder"):
        federation(tmp_path, 1, labels=("x", "y"))


# Who is waited for


def state(fed: Federation) -> str:
    return StatusBoard(fed).status().state


@pytest.mark.parametrize(("strategy", "waits"), [("fedavg", True), ("gsfs", True), ("fedbuff", False)])
def test_a_server_that_goes_on_with_more_devices_waits_for_them(tmp_path: Path, strategy: str, waits: bool) -> None:
    settings: dict[str, Any] = {"strategy": {"name": strategy, "quorum": 0.9}, "pool": tmp_path / "out/pool"}
    earlier = federation(tmp_path / "adapters", 2, **settings)
    for member in (device("a"), device("b"), edge()):
        earlier.join(member)
    earlier.propose("edge", PLACEMENT, adapter(0))
    assert state(earlier) == "training"
    earlier.close()
    clock = Clock()
    fed = federation(tmp_path / "adapters", 3, clock, join_wait_s=30, **settings)
    for name in ("a", "b"):
        fed.join(device(name))
        fed.watch_begins(name)
    waiting = "no new version before more devices are here: 2 of 3 have joined"
    assert state(fed) == (waiting if waits else "training")
    submit(fed, "a", adapter(1))
    submit(fed, "b", adapter(2))
    assert (fed.version, state(fed)) == (0, waiting if waits else "training")
    clock.now += 31
    assert state(fed) == "training", "the third is not expected any more"


def test_devices_that_are_enough_are_not_said_to_wait_for_others(tmp_path: Path) -> None:
    started(tmp_path, [device("a"), device("b")])
    fed = federation(tmp_path, 3, strategy={"quorum": 0.5})
    for name in ("a", "b"):
        fed.join(device(name))
    assert state(fed) == "training"


# Moments of a server optimiser


def test_a_server_optimiser_goes_on_after_a_restart_as_if_there_had_been_none(tmp_path: Path) -> None:
    strategy = {"name": "fedadam", "local_steps": 1}
    without = started(tmp_path / "without", [device("a")], strategy=strategy)
    for version in range(4):
        submit(without, "a", adapter(version), str(version), version)
    first = started(tmp_path / "with", [device("a")], strategy=strategy)
    for version in range(2):
        submit(first, "a", adapter(version), str(version), version)
    second = federation(tmp_path / "with", 1, strategy=strategy)
    second.join(edge())
    second.join(device("a"))
    for version in range(2, 4):
        submit(second, "a", adapter(version), str(version), version)
    assert same(second.fetch("a", 4), without.fetch("a", 4))


def test_moments_of_another_strategy_are_not_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    submit(started(tmp_path, [device("a")], strategy={"name": "fedadam"}), "a", adapter(1))
    fed = federation(tmp_path, 1, strategy={"name": "fedyogi"})
    assert "version 1 was made by fedadam" in caplog.text
    fed.join(device("a"))
    submit(fed, "a", adapter(2), "2", version=1)
    assert fed.version == 2


@pytest.mark.parametrize(
    ("moments", "reason"),
    [
        ({"m": adapter(0)}, "the moments m, expected m, v"),
        ({"m": adapter(0), "v": device_half(adapter(0), 2)}, "2/q/A is missing"),
        ({"m": adapter(0), "v": adapter(0) | {AdapterKey(0, "q", "A"): np.ones((3, 3), "f4")}}, r"0/q/A has shape \(3, 3\)"),
    ],
)
def test_moments_that_do_not_fit_their_version_stop_the_start(tmp_path: Path, moments: Moments, reason: str) -> None:
    submit(started(tmp_path, [device("a")], strategy={"name": "fedadam"}), "a", adapter(1))
    content = server_state.files(Aggregated({}, ServerState(moments)), "fedadam")
    (tmp_path / "v1" / server_state.MOMENTS).write_bytes(content[server_state.MOMENTS])
    (tmp_path / "v1" / "SHA256SUMS").unlink()
    with pytest.raises(AdapterError, match=f"server_state.safetensors of version 1 does not belong to it: .*{reason}.*delete"):
        federation(tmp_path, 1, strategy={"name": "fedadam"})


@pytest.mark.parametrize("name", ["server_state.safetensors", "privacy.json"])
def test_a_damaged_server_state_stops_the_start(tmp_path: Path, name: str) -> None:
    changes = {"strategy": {"name": "fedadam"}, "privacy": {"clip": 1.0}}
    submit(started(tmp_path, [device("a")], **changes), "a", adapter(1))
    (tmp_path / "v1" / name).write_bytes(b"no")
    (tmp_path / "v1" / "SHA256SUMS").unlink()
    with pytest.raises(AdapterError, match=f"{name} of version 1 is damaged"):
        federation(tmp_path, 1, **changes)


def test_what_a_version_that_could_not_be_written_would_have_left_is_forgotten(tmp_path: Path) -> None:
    fed = started(tmp_path / "a", [device("a")], strategy={"name": "fedadam"})
    (tmp_path / "a" / "v1").mkdir()
    submit(fed, "a", adapter(1))
    fed.tick()
    (tmp_path / "a" / "v1").rmdir()
    fed.tick()
    straight = started(tmp_path / "b", [device("a")], strategy={"name": "fedadam"})
    submit(straight, "a", adapter(1))
    for one in (fed, straight):
        submit(one, "a", adapter(2), "2", version=1)
    assert same(fed.fetch("a", 2), straight.fetch("a", 2))


# Privacy

PRIVATE = {"clip": 1.0, "noise": 3.0}


def test_spent_privacy_outlives_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    privacy = {"clip": 1.0, "noise": 1.0, "seed": 1}
    first = started(tmp_path, [device("a")], privacy=privacy)
    submit(first, "a", adapter(1))
    second = federation(tmp_path, 1, privacy=privacy)
    assert second.epsilons() == first.epsilons() and first.epsilons()["a"] > 0


def test_a_version_without_noise_has_spent_all_privacy_of_those_in_it(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    fed = started(tmp_path / "adapters", [device("a"), device("b")], strategy={"quorum": 0.5})
    submit(fed, "a", adapter(1))
    assert fed.epsilons() == {}, "nothing is promised"
    privacy, metrics = {"clip": 1.0, "noise": 3.0, "epsilon": 8.0}, MetricsWriter(tmp_path / "metrics.jsonl")
    assert not (tmp_path / "adapters" / "v1" / "privacy.json").exists()
    again = federation(tmp_path / "adapters", 2, strategy={"quorum": 0.5}, privacy=privacy, metrics=metrics)
    for member in (device("a"), device("b"), edge()):
        again.join(member)
    assert again.epsilons() == {"a": math.inf}
    submit(again, "a", adapter(1), "2", version=1)
    (event,) = told(tmp_path, "refused")
    assert event["device"] == "a" and "epsilon is inf and one more version" in event["reason"]
    submit(again, "b", adapter(1), "2", version=1)
    assert again.epsilons()["a"] == math.inf and 0 < again.epsilons()["b"] < 8
    third = federation(tmp_path / "adapters", 2, privacy={"clip": 1.0, "noise": 3.0})
    assert third.epsilons() == again.epsilons(), "an infinite account is kept on disk, too"


def test_what_was_spent_before_privacy_was_switched_off_is_not_forgotten(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    members, spent = [device("a"), device("b"), device("c")], {}
    for version, (name, privacy) in enumerate([("a", PRIVATE), ("b", {}), ("b", {"clip": 1.0}), ("c", PRIVATE), ("a", PRIVATE)]):
        fed = federation(tmp_path, 3, privacy=privacy) if version else started(tmp_path, members, privacy=privacy)
        for member in [*members, edge()]:
            fed.join(member)
        submit(fed, name, adapter(version), str(version), version)
        spent[version + 1] = fed.epsilons()
    assert spent[1].keys() == {"a"} and spent[2] == spent[3] == {}, "off or without noise, nothing is promised"
    assert spent[4].keys() == {"a", "b", "c"} and spent[4]["b"] == math.inf
    assert spent[4]["a"] == spent[4]["c"] == spent[1]["a"] < spent[5]["a"] < math.inf
    accounts = {folder.name for folder in tmp_path.iterdir() if (folder / "privacy.json").exists()}
    assert accounts == {"v1", "v3", "v4", "v5"}, "none is kept without privacy"


@pytest.mark.parametrize(("content", "reason"), [(None, "it is not known whose updates it holds"), ("no", "is damaged")])
def test_nothing_is_promised_when_it_is_not_known_who_is_in_a_version_without_privacy(
    tmp_path: Path, content: str | None, reason: str
) -> None:
    submit(started(tmp_path, [device("a")]), "a", adapter(1))
    devices = tmp_path / "v1" / "devices.json"
    assert json.loads(devices.read_text()) == {"a": 1.0}
    devices.unlink() if content is None else devices.write_text(content)
    (tmp_path / "v1" / "SHA256SUMS").unlink()
    assert federation(tmp_path, 1).version == 1, "without privacy it does not matter"
    with pytest.raises(AdapterError, match=f"devices.json.*{reason}"):
        federation(tmp_path, 1, privacy={"clip": 1.0})
