"""Which versions stay on disk, and what goes on without those that do not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from sfl.adapters.state import device_half, edge_half
from sfl.errors import AdapterError, RefusedError
from sfl.fed_server.coordinator import Federation
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import adapter, device, edge, federation, half, same, started, submit, told

EACH = {"quorum": 0.1}  # a version for each upload


def kept(folder: Path) -> set[int]:
    return {int(path.name[1:]) for path in folder.iterdir()}


def go_on(fed: Federation, name: str, until: int) -> None:
    """Uploads of one device, each of which makes a version, which the device takes over."""
    for version in range(fed.version or 0, until):
        submit(fed, name, adapter(version), str(version), version)
        fed.fetch(name, version + 1)


def test_version_0_and_the_newest_are_kept(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")], keep_versions=3)
    everything = {}
    for version in range(6):
        go_on(fed, "a", version)
        everything[version] = fed.fetch("a", version)
    assert kept(tmp_path) == {0, 3, 4, 5}
    assert all(same(fed.fetch("a", version), everything[version]) for version in kept(tmp_path))
    with pytest.raises(RefusedError, match="version 2 has been removed, and 5 is the newest: `keep_versions` in the fed"):
        fed.fetch("a", 2)
    again = federation(tmp_path, 1, keep_versions=1)
    again.join(device("a"))
    again.join(edge())
    assert again.version == 5 and kept(tmp_path) == {0, 3, 4, 5}
    go_on(again, "a", 6)
    assert kept(tmp_path) == {0, 6}


def test_by_default_a_long_run_does_not_fill_the_disk_and_0_keeps_all(tmp_path: Path) -> None:
    for folder, changes in (("default", {}), ("all", {"keep_versions": 0})):
        go_on(started(tmp_path / folder, [device("a")], **changes), "a", 30)
    assert kept(tmp_path / "default") == {0, *range(11, 31)} and kept(tmp_path / "all") == set(range(31))


def test_what_a_device_trains_on_is_kept_until_it_takes_another_version_or_is_done(tmp_path: Path) -> None:
    fed = started(tmp_path, [device(name) for name in "abc"], strategy=EACH, keep_versions=1)
    go_on(fed, "a", 2)
    fed.fetch("b", 2)
    go_on(fed, "a", 4)
    fed.fetch("c", 4)
    fed.fetch("edge", 3, 1)  # edge servers hold no version of their own
    go_on(fed, "a", 6)
    assert kept(tmp_path) == {0, 2, 4, 5, 6}, "a trained on 5 when 6 came"
    fed.fetch("b", 6)
    go_on(fed, "a", 8)
    assert kept(tmp_path) == {0, 4, 6, 7, 8}
    fed.leave("c")
    go_on(fed, "a", 9)
    assert kept(tmp_path) == {0, 6, 8, 9}


@pytest.mark.parametrize("merge", ["average", "fedex", "flexlora"])
def test_updates_of_old_versions_count_as_if_all_were_kept(tmp_path: Path, merge: str) -> None:
    """Those in the pool, halves that wait for their other half among them, whatever their devices have fetched since."""
    found = {}
    for keep in (0, 1):
        metrics = MetricsWriter(tmp_path / str(keep) / "metrics.jsonl")
        folder = tmp_path / str(keep) / "adapters"
        members = [device(name) for name in "abc"]
        fed = started(folder, members, strategy=EACH, keep_versions=keep, merge=merge, metrics=metrics)
        go_on(fed, "a", 2)
        fed.fetch("b", 2)
        fed.fetch("c", 2)
        fed.submit(half("device", "b", "old", 2), device_half(adapter(20), 1))
        fed.fetch("b", 2)
        go_on(fed, "a", 5)
        fed.fetch("b", 5)
        go_on(fed, "a", 7)
        assert keep == 0 or kept(folder) == {0, 2, 5, 6, 7}
        fed.submit(half("edge", "b", "old", 2), edge_half(adapter(20), 1))
        submit(fed, "c", adapter(21), "old", 2)
        found[keep] = fed.fetch("a", 9)
        assert not told(tmp_path / str(keep), "refused")
    assert same(found[0], found[1])


def test_an_update_whose_version_is_gone_is_refused_alone(tmp_path: Path) -> None:
    """As after a restart, when it is not known who trains on what."""
    changes: dict[str, Any] = {"strategy": EACH, "keep_versions": 1, "merge": "fedex"}
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a"), device("b")], metrics=metrics, **changes)
    go_on(fed, "a", 5)
    submit(fed, "b", adapter(1), "1", version=2)
    (event,) = told(tmp_path, "refused")
    assert event["device"] == "b" and "version 2 has been removed, and 5 is" in event["reason"]
    go_on(fed, "a", 6)
    assert fed.version == 6


def test_a_version_that_cannot_be_deleted_is_deleted_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(self: Path, target: Path) -> Path:
        raise OSError("busy")

    fed = started(tmp_path, [device("a")], keep_versions=1)
    go_on(fed, "a", 1)
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (fails if self.name == "v1" else rename)(self, target))
    go_on(fed, "a", 3)
    assert "cannot delete" in caplog.text and kept(tmp_path) == {0, 1, 2, 3}
    monkeypatch.undo()
    go_on(fed, "a", 4)
    assert kept(tmp_path) == {0, 3, 4}


# What was spent of privacy


def test_it_is_not_forgotten_who_was_in_versions_without_privacy(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    members = [device(name) for name in "abc"]
    private: dict[str, Any] = {"strategy": EACH, "keep_versions": 1, "privacy": {"clip": 1.0, "noise": 3.0}}
    fed = started(tmp_path, members, **private)
    go_on(fed, "a", 2)
    before = fed.epsilons()
    fed = federation(tmp_path, 3, strategy=EACH, keep_versions=1)
    for member in [*members, edge()]:
        fed.join(member)
    go_on(fed, "b", 4)
    go_on(fed, "c", 6)
    assert kept(tmp_path) == {0, 4, 5, 6}, "the last ones of b and c"
    again = federation(tmp_path, 3, **private)
    assert again.epsilons() == {"a": before["a"], "b": math.inf, "c": math.inf} and 0 < before["a"] < math.inf


def test_nothing_is_promised_when_that_had_been_lost_before(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")], keep_versions=2)
    go_on(fed, "a", 2)
    (tmp_path / "v1" / "devices.json").unlink()
    go_on(fed, "a", 6)
    assert kept(tmp_path) == {0, 5, 6}, "without privacy it does not matter"
    with pytest.raises(AdapterError, match=r"version 4 .* has no devices\.json, so it is not known whose updates it holds"):
        federation(tmp_path, 1, privacy={"clip": 1.0})
