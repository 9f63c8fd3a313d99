from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfl.errors import RefusedError
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import PLACEMENT, Clock, adapter, device, edge, federation, started, submit, told


def test_a_quorum_that_is_not_formed_is_told_once_with_who_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock, metrics = Clock(), MetricsWriter(tmp_path / "metrics.jsonl")
    strategy = {"quorum": 1.0, "round_timeout_s": 30}
    fed = started(tmp_path / "adapters", [device(name) for name in "abc"], clock, strategy=strategy, metrics=metrics)
    submit(fed, "b", adapter(1))
    clock.now += 29
    fed.tick()
    assert not told(tmp_path, "no_quorum")
    for _ in range(3):
        clock.now += 2
        fed.tick()
    (event,) = told(tmp_path, "no_quorum")
    assert (event["waited_s"], event["missing"], event["yet_to_join"]) == (31, ["a", "c"], 0)
    assert caplog.text.count("the updates of b have waited 31 s for others: nothing has come from a, c") == 1
    for name in "ac":
        submit(fed, name, adapter(1))
    assert fed.version == 1
    clock.now += 100
    submit(fed, "a", adapter(1), "2", 1)
    assert len(told(tmp_path, "no_quorum")) == 1, "a new pool waits anew"
    clock.now += 31
    fed.tick()
    assert [event["missing"] for event in told(tmp_path, "no_quorum")] == [["a", "c"], ["b", "c"]]


def test_the_quorum_forms_without_a_device_that_died(tmp_path: Path) -> None:
    clock = Clock()
    fed = started(tmp_path, [device("a"), device("b"), device("c")], clock, strategy={"quorum": 1.0}, away_after_s=60)
    submit(fed, "a", adapter(1))
    submit(fed, "b", adapter(2))
    fed.watch_ends("c")
    clock.now += 59
    fed.tick()
    assert fed.version == 0
    clock.now += 2
    fed.tick()
    assert fed.version == 1
    fed.watch_begins("c")
    submit(fed, "a", adapter(1), "2")
    submit(fed, "b", adapter(2), "2")
    assert fed.version == 1, "a device that came back counts again"
    submit(fed, "c", adapter(3), "1")
    assert fed.version == 2


def test_a_device_that_left_is_not_waited_for(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"name": "fedavg"})
    submit(fed, "a", adapter(1))
    assert fed.version == 0
    fed.leave("b")
    assert fed.version == 1 and not fed.finished


def test_fedavg_does_not_wait_for_ever_for_a_device_that_is_silent(tmp_path: Path) -> None:
    clock = Clock()
    fed = started(tmp_path, [device("a"), device("b")], clock, strategy={"name": "fedavg", "round_timeout_s": 30})
    submit(fed, "a", adapter(1))
    clock.now += 31
    fed.tick()
    assert fed.version == 1


@pytest.mark.parametrize(("name", "last"), [("gsfs", 1), ("gsfs-printed", 0)])
def test_the_rest_of_the_pool_is_aggregated_at_the_end_if_the_strategy_says_so(tmp_path: Path, name: str, last: int) -> None:
    clock = Clock()
    fed = started(tmp_path, [device("a"), device("b")], clock, strategy={"name": name, "quorum": 1.0}, away_after_s=60)
    submit(fed, "a", adapter(1))
    fed.watch_ends("b")
    fed.watch_ends("a")
    clock.now += 61
    fed.tick()
    assert not fed.finished and fed.version == 0, "when all are away and none is done, they may come back"
    fed.watch_begins("a")
    fed.leave("a")
    assert fed.finished and fed.version == last


@pytest.mark.parametrize("strategy", [{"name": "gsfs", "quorum": 0.6}, {"name": "fedavg"}], ids=lambda strategy: strategy["name"])
def test_a_device_that_has_yet_to_join_is_waited_for_up_to_the_grace(tmp_path: Path, strategy: dict[str, Any]) -> None:
    clock = Clock()
    fed = federation(tmp_path, 3, clock, labels=("benign", "scan"), strategy=strategy, away_after_s=60, join_wait_s=300)
    fed.join(edge())
    fed.join(device("a"))
    fed.propose("edge", PLACEMENT, adapter(0))
    fed.watch_begins("a")
    clock.now += 299
    submit(fed, "a", adapter(1))
    assert fed.version == 0, "one of three devices is no quorum"
    clock.now += 2
    fed.tick()
    assert fed.version == 1


def test_the_end_waits_for_devices_that_have_yet_to_join(tmp_path: Path) -> None:
    clock = Clock()
    fed = federation(tmp_path, 2, clock, labels=("benign", "scan"), away_after_s=60, join_wait_s=300)
    fed.join(edge())
    fed.join(device("a"))
    fed.propose("edge", PLACEMENT, adapter(0))
    fed.leave("a")
    clock.now += 299
    fed.tick()
    assert not fed.finished
    clock.now += 2
    fed.tick()
    assert fed.finished
    for late in (device("b"), device("a")):
        with pytest.raises(RefusedError, match="has finished"):
            fed.join(late)
    fed.join(edge())


def test_a_device_that_joins_again_is_back(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 1.0})
    fed.leave("a")
    fed.join(device("a"))
    fed.leave("b")
    assert not fed.finished
