from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import device_half, edge_half, total
from sfl.fed_server import ledger
from sfl.fed_server.aggregation import Aggregated
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import (
    PLACEMENT,
    Clock,
    adapter,
    aggregations,
    device,
    edge,
    federation,
    half,
    no_more_files,
    same,
    started,
    submit,
    told,
)

# Of updates


def test_an_update_of_an_older_version_counts_and_its_lag_is_told(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(
        tmp_path / "adapters", [device("a"), device("b")], strategy={"quorum": 0.5, "weights": "examples"}, metrics=metrics
    )
    submit(fed, "a", adapter(1))
    submit(fed, "b", adapter(2), version=0)
    assert same(fed.fetch("a", 2), total(fed.fetch("a", 1), adapter(2)))
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["name"] for event in events if event["event"] == "join"] == ["a", "b", "edge"]
    first, second = (event for event in events if event["event"] == "aggregate")
    assert (first["version"], first["lags"], second["version"], second["lags"]) == (1, {"a": 0}, 2, {"b": 1})
    assert second["devices"] == {"b": 1.0} and second["submissions"] == 1


def test_the_weight_of_an_update_goes_by_what_its_device_has_now(tmp_path: Path) -> None:
    clock = Clock()
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    members = [device("a", examples=1000), device("b", examples=10)]
    fed = started(tmp_path / "adapters", members, clock, strategy={"quorum": 1.0}, metrics=metrics)
    submit(fed, "a", adapter(1))
    fed.watch_ends("a")
    clock.now += 61
    fed.join(device("a", examples=100))
    submit(fed, "b", adapter(2))
    assert fed.version == 1
    (event,) = aggregations(tmp_path)
    assert event["devices"] == pytest.approx({"a": 100 / 110, "b": 10 / 110})


def test_devices_that_died_have_no_share_and_those_that_left_keep_theirs(tmp_path: Path) -> None:
    clock = Clock()
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device(name) for name in "abcd"], clock, strategy={"quorum": 0.5}, metrics=metrics)
    submit(fed, "d", adapter(4))
    for name in "cd":
        fed.watch_ends(name)
    clock.now += 61
    fed.tick()
    fed.leave("b")
    submit(fed, "a", adapter(1))
    (first, second) = aggregations(tmp_path)
    assert first["devices"] == pytest.approx({"d": 1 / 3}), "in the pool, though it died; c died without an update"
    assert second["devices"] == pytest.approx({"a": 1 / 2})


def test_devices_yet_to_join_have_a_share_until_the_time_for_it_is_over(tmp_path: Path) -> None:
    clock, metrics = Clock(), MetricsWriter(tmp_path / "metrics.jsonl")
    fed = federation(tmp_path / "adapters", 4, clock, metrics, labels=("benign", "scan"), join_wait_s=100)
    for member in (device("a", examples=30), device("b", examples=10), edge()):
        fed.join(member)
        fed.watch_begins(member.name)
    fed.propose("edge", PLACEMENT, adapter(0))
    submit(fed, "a", adapter(1))
    clock.now += 101
    submit(fed, "a", adapter(2), submission="2", version=1)
    (first, second) = aggregations(tmp_path)
    assert first["devices"] == pytest.approx({"a": 30 / 80}), "two more, of 20 each"
    assert second["devices"] == pytest.approx({"a": 30 / 40})


def test_an_edge_server_has_no_share_whatever_it_says(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a"), device("b")], strategy={"quorum": 1.0}, metrics=metrics)
    fed.join(edge("another", examples=1000))
    submit(fed, "a", adapter(1))
    submit(fed, "b", adapter(2))
    (event,) = aggregations(tmp_path)
    assert event["devices"] == {"a": 0.5, "b": 0.5}


def test_an_aggregation_tells_what_its_updates_were_made_of(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a"), device("b")], strategy={"quorum": 1.0}, metrics=metrics)
    for name, submission, steps in (("a", "1", 3), ("a", "2", 4), ("b", "1", 5)):
        fed.submit(half("edge", name, submission), edge_half(adapter(1), 1))
        fed.submit(half("device", name, submission, steps=steps, examples=8 * steps), device_half(adapter(1), 1))
    (event,) = aggregations(tmp_path)
    assert (event["steps"], event["trained_on"]) == ({"a": 7, "b": 5}, {"a": 56, "b": 40})


def test_an_update_that_can_never_be_aggregated_is_refused_and_takes_no_other_with_it(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    pool = tmp_path / "pool"
    fed = started(tmp_path / "adapters", [device("a"), device("b")], strategy={"quorum": 1.0}, metrics=metrics, pool=pool)
    submit(fed, "b", adapter(2))
    fed.submit(half("device", "a"), device_half(adapter(1), 1))
    next(pool.glob("*-device.safetensors")).write_bytes(b"the disk is failing")
    fed.submit(half("edge", "a"), edge_half(adapter(1), 1))
    half_of_b = {key: value + 0.5 * adapter(2)[key] for key, value in adapter(0).items()}
    assert fed.version == 1 and all(np.allclose(value, half_of_b[key]) for key, value in fed.fetch("a", 1).items())
    (event,) = told(tmp_path, "refused")
    assert fed.refused == 1 and event["device"] == "a" and "cannot be read" in event["reason"]
    aside = ["00000003-device.safetensors.damaged"]
    assert [path.name for path in pool.iterdir()] == aside
    fed.submit(half("device", "a", "2", 1), device_half(adapter(1), 1))
    next(pool.glob("*-device.safetensors")).write_bytes(b"the disk is failing")
    fed.leave("b")
    fed.submit(half("edge", "a", "2", 1), edge_half(adapter(1), 1))
    assert (fed.version, fed.refused) == (1, 2), "nobody waits for a version that would be the same"
    submit(fed, "a", adapter(1), "3", version=1)
    assert (fed.version, fed.refused) == (2, 2)
    assert sorted(path.name for path in pool.iterdir()) == [*aside, "00000005-device.safetensors.damaged"]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_a_file_of_the_pool_that_can_never_be_read_is_set_aside_and_the_others_go_on(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = Path.open

    def failing(path: Path, *arguments: Any, **more: Any) -> Any:
        if path.name == "00000001-device.safetensors":
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", failing)
    members = [device(name) for name in "abc"]
    fed = started(tmp_path / "adapters", members, strategy={"quorum": 1.0}, pool=tmp_path / "pool")
    for seed, name in enumerate("abc"):
        submit(fed, name, adapter(seed))
    assert (fed.version, fed.refused, fed.pooled(), fed.held_up) == (1, 1, [], "")
    assert os.strerror(number) in caplog.text
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["00000001-device.safetensors.damaged"]
    fed.close()
    assert ledger.check(tmp_path) == ledger.Balance(accepted=3, counted=2, refused=1)


def test_each_reason_for_which_no_version_can_be_made_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fed = started(tmp_path, [device("a")], strategy={"name": "gsfs", "min_steps": 1})
    obstacle = tmp_path / "v1"
    obstacle.mkdir()
    submit(fed, "a", adapter(1))
    fed.tick()
    assert caplog.text.count("no version can be made") == 1
    taken = fed._maker._aggregation

    def refusing(*arguments: Any) -> Any:
        raise OSError(errno.EMFILE, "another reason")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taken, "aggregate", refusing)
        fed.tick()
        fed.tick()
    assert caplog.text.count("no version can be made") == 2 and caplog.text.count("another reason") == 1
    lost = Aggregated(adapter(0), taken.server_state, rejected={"a": "it was not used"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(taken, "aggregate", lambda *arguments: lost)
        fed.tick()
    assert (fed.version, fed.refused, fed.held_up) == (0, 1, "")
    submit(fed, "a", adapter(1), "2")
    assert caplog.text.count("no version can be made") == 3, "another pool, and told anew"


def test_a_version_that_cannot_be_written_is_tried_again_with_nothing_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fed = started(tmp_path, [device("a")])
    obstacle = tmp_path / "v1"
    obstacle.mkdir()
    submit(fed, "a", adapter(1))
    fed.tick()
    assert fed.version == 0 and caplog.text.count("it is tried again every second") == 1
    obstacle.rmdir()
    fed.tick()
    assert fed.version == 1 and same(fed.fetch("a", 1), total(adapter(0), adapter(1)))


@pytest.mark.parametrize("strategy", ["fedavg", "gsfs"])
def test_updates_that_cannot_be_read_for_a_moment_are_not_lost(
    tmp_path: Path, strategy: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [device("a"), device("b")]
    fed = started(tmp_path / "adapters", members, strategy={"name": strategy, "quorum": 1.0}, pool=tmp_path / "pool")
    aggregate = fed._aggregation.aggregate

    def starved(*arguments: Any) -> Any:
        with no_more_files():
            return aggregate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(fed._aggregation, "aggregate", starved)
        submit(fed, "a", adapter(1))
        submit(fed, "b", adapter(2))
        fed.tick()
        assert (fed.version, fed.refused, fed.pooled()) == (0, 0, ["a", "b"])
    assert caplog.text.count("Too many open files") == 1
    fed.tick()
    assert (fed.version, fed.refused) == (1, 0)
    assert ledger.check(tmp_path) == ledger.Balance(accepted=2, counted=2)


def test_an_earlier_version_that_cannot_be_read_for_a_moment_costs_nobody_an_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 0.5}, merge="flora")
    submit(fed, "a", adapter(1))
    load = fed._store.load

    def starved(number: int) -> Any:
        with no_more_files():
            return load(number)

    with monkeypatch.context() as patch:
        patch.setattr(fed._store, "load", starved)
        submit(fed, "b", adapter(2))
        assert (fed.version, fed.refused, fed.pooled()) == (1, 0, ["b"])
        with pytest.raises(OSError, match="Too many open files"):
            fed.fetch("b", 0)
    fed.tick()
    assert (fed.version, fed.refused, fed.pooled()) == (2, 0, [])


@pytest.mark.parametrize("name", ["gsfs", "fedavg"])
def test_a_pool_that_is_lost_as_a_whole_is_told_device_by_device(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    strategy = {"name": name, "quorum": 1.0} if name == "gsfs" else {"name": name}
    fed = started(tmp_path / "adapters", [device("a"), device("b")], strategy=strategy, metrics=metrics)
    monkeypatch.setattr("sfl.fed_server.intake.GREATEST", float("inf"))
    with np.errstate(over="ignore"):  # each is finite, and a's two together are not
        for member, submission in (("a", "1"), ("a", "2"), ("b", "1")):
            submit(fed, member, {key: np.full_like(value, 3e38) for key, value in adapter(1).items()}, submission)
    refused = told(tmp_path, "refused")
    assert [(event["device"], event["submission"]) for event in refused] == [("a", None), ("b", None)] and fed.refused == 2
    assert all("would hold values that are not finite" in event["reason"] for event in refused)
    assert "the updates of a, b are lost" in caplog.text
    unchanged = {"devices": {}, "lags": {}, "steps": {}, "trained_on": {}, "submissions": 0, "version": 1}
    found = [{key: value for key, value in event.items() if key in unchanged} for event in aggregations(tmp_path)]
    assert found == ([unchanged] if name == "fedavg" else [])
    assert fed.version == len(found) and same(fed.fetch("a", len(found)), adapter(0))
    submit(fed, "a", adapter(1), "3", len(found))
    submit(fed, "b", adapter(1), "3", len(found))
    assert fed.version == len(found) + 1 and fed.refused == 2, "the pool was empty, and goes on"


# Robust rules


def test_a_robust_rule_waits_for_the_updates_that_it_needs_while_they_can_come(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, metrics = Clock(), MetricsWriter(tmp_path / "metrics.jsonl")
    members = [device(name) for name in "abc"]
    robust = {"rule": "median", "attackers": 1}
    fed = started(tmp_path / "adapters", members, clock, strategy={"quorum": 0.3}, robust=robust, metrics=metrics)
    submit(fed, "a", adapter(1))
    submit(fed, "b", adapter(1))
    fed.tick()
    assert fed.version == 0 and caplog.text.count("median needs 3 updates to bear 1 attackers, and the pool has 2: waiting") == 0
    assert caplog.text.count("needs 3 updates to bear 1 attackers") == 1, "said once"
    submit(fed, "c", adapter(1))
    assert fed.version == 1
    submit(fed, "a", adapter(1), "2", version=1)
    fed.leave("c")
    assert fed.version == 1, "there will never be three again"
    assert [event["device"] for event in told(tmp_path, "refused")] == ["a"] and not fed.finished


def test_a_robust_rule_does_not_wait_for_ever(tmp_path: Path) -> None:
    clock, metrics = Clock(), MetricsWriter(tmp_path / "metrics.jsonl")
    robust, strategy = {"rule": "median", "attackers": 1}, {"quorum": 0.3, "round_timeout_s": 30}
    members = [device(name) for name in "abc"]
    fed = started(tmp_path / "adapters", members, clock, strategy=strategy, robust=robust, metrics=metrics)
    for number in range(2):
        submit(fed, "a", adapter(1), str(number))
        clock.now += 29
        fed.tick()
        assert fed.refused == number
        clock.now += 2
        fed.tick()
        assert (fed.version, fed.refused) == (0, number + 1)
    assert [event["device"] for event in told(tmp_path, "refused")] == ["a", "a"]
    assert "median needs 3 updates" in told(tmp_path, "refused")[0]["reason"]


@pytest.mark.parametrize("waits", [False, True])
def test_a_robust_rule_may_be_told_not_to_wait(tmp_path: Path, waits: bool) -> None:
    robust = {"rule": "median", "attackers": 1, "too_few": "refuse"}
    strategy = {"name": "fedavg", "round_timeout_s": 30} if waits else {"quorum": 0.3}
    clock = Clock()
    fed = started(tmp_path, [device(name) for name in "abc"], clock, strategy=strategy, robust=robust)
    submit(fed, "a", adapter(1))
    clock.now += 31
    fed.tick()
    assert fed.refused == 1 and fed.version == waits, "unchanged, but there where devices wait for it"
    assert same(fed.fetch("a", int(waits)), adapter(0))


def test_who_was_taken_for_an_attacker_is_told(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    members = [device(name) for name in "abcdx"]
    robust = {"rule": "multi-krum", "attackers": 1}
    fed = started(tmp_path / "adapters", members, strategy={"name": "fedavg"}, robust=robust, metrics=metrics)
    for number, name in enumerate("abcd"):
        submit(fed, name, {key: value + np.float32(0.01 * number) for key, value in adapter(1).items()})
    submit(fed, "x", {key: -50 * value for key, value in adapter(1).items()})
    (event,) = told(tmp_path, "refused")
    (done,) = aggregations(tmp_path)
    assert event["device"] == "x" and "x" not in done["devices"] and done["devices"].keys() == set("abcd")
    assert done["steps"].keys() == done["devices"].keys()
