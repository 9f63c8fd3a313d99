from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterKey, AdapterState, device_half, edge_half, total
from sfl.errors import AdapterError, RefusedError
from sfl.fed_server import ledger
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import LAYERS, Clock, adapter, device, half, no_file_above, same, started, submit, told

# Halves


def test_one_devices_update_is_the_next_version(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    submit(fed, "a", adapter(1))
    assert fed.version == 1
    assert same(fed.fetch("a", 1), total(adapter(0), adapter(1)))
    assert same(fed.fetch("a", 0), adapter(0))


ARRIVALS = [(name, role) for name in "abc" for role in ("device", "edge")]


@cache
def in_turn() -> AdapterState:
    """The version of three devices of one cut that submit one after the other, once each."""
    with TemporaryDirectory() as folder:
        fed = started(Path(folder), [device(name, examples=10 + ord(name)) for name in "abc"], strategy={"quorum": 1.0})
        for seed, name in enumerate("abc", start=1):
            submit(fed, name, adapter(seed, 0.1))
        return fed.fetch("a", 1)


@settings(deadline=None, max_examples=30)
@given(order=st.permutations(ARRIVALS), cuts=st.tuples(*[st.integers(1, LAYERS - 1)] * 3), resend=st.sets(st.integers(0, 5)))
def test_neither_order_nor_cuts_nor_resending_change_the_result(
    order: list[Any], cuts: tuple[int, ...], resend: set[int]
) -> None:
    deltas = {name: adapter(seed, 0.1) for seed, name in enumerate("abc", start=1)}
    with TemporaryDirectory() as folder:
        members = [device(name, cut=cut, examples=10 + ord(name)) for name, cut in zip("abc", cuts)]
        fed = started(Path(folder), members, strategy={"quorum": 1.0})
        cut_of = dict(zip("abc", cuts))
        for number, (name, role) in enumerate(order):
            part = (device_half if role == "device" else edge_half)(deltas[name], cut_of[name])
            fed.submit(half(role, name), part)
            if number in resend:
                fed.submit(half(role, name), part)
        assert fed.version == 1 and fed.submissions == 3
        result = fed.fetch("a", 1)
    assert same(result, in_turn())


def test_a_duplicate_stays_one_after_its_aggregation(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    submit(fed, "a", adapter(1))
    fed.submit(half("device", "a"), device_half(adapter(1), 1))
    fed.submit(half("edge", "a"), edge_half(adapter(1), 1))
    assert (fed.version, fed.submissions) == (1, 1)


def test_a_submission_that_comes_again_is_told_apart_and_counts_once(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a"), device("b")], strategy={"quorum": 1.0}, metrics=metrics)
    submit(fed, "a", adapter(1))
    assert not told(tmp_path, "duplicate")
    submit(fed, "a", adapter(1))
    found = [(event["device"], event["submission"], event["half"]) for event in told(tmp_path, "duplicate")]
    assert found == [("a", "1", "device"), ("a", "1", "edge")] and fed.submissions == 1


def test_the_link_of_each_upload_is_told(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a")], metrics=metrics)
    fed.submit(half("edge", "a"), edge_half(adapter(1), 1))
    link = {"bytes_per_s": 1e5, "round_trip_s": 0.2, "failures": 1}
    fed.submit(half("device", "a", **link), device_half(adapter(1), 1))
    (event,) = told(tmp_path, "upload")
    assert (event["device"], event["submission"], event["version"]) == ("a", "1", 0) and event.items() >= link.items()


def test_successive_submissions_add_up_and_are_one_device_to_the_quorum(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 1.0, "weights": "frequency"})
    submit(fed, "a", adapter(1), "1")
    submit(fed, "a", adapter(2), "2")
    assert fed.version == 0
    submit(fed, "b", adapter(3), "1")
    assert fed.version == 1
    result = fed.fetch("a", 1)
    for key, value in result.items():
        a, b = adapter(1)[key] + adapter(2)[key], adapter(3)[key]
        np.testing.assert_allclose(value, adapter(0)[key] + 2 / 3 * a + 1 / 3 * b, rtol=1e-5, atol=1e-6)


OTHER_RANK = {AdapterKey(0, "q", "A"): np.ones((8, 3), "f4"), AdapterKey(0, "q", "B"): np.ones((5, 8), "f4")}


@pytest.mark.parametrize(
    ("role", "state", "reason"),
    [
        ("device", device_half(adapter(1), 2), "1/q/A is unknown"),
        ("device", {}, "0/q/A is missing"),
        ("edge", edge_half(adapter(1), 2), "1/q/A is missing"),
        ("device", OTHER_RANK, r"0/q/A has shape \(8, 3\), expected \(2, 3\)"),
    ],
)
def test_a_half_must_be_exactly_that_half(tmp_path: Path, role: Any, state: Any, reason: str) -> None:
    fed = started(tmp_path, [device("a", cut=1)])
    with pytest.raises(AdapterError, match=reason):
        fed.submit(half(role, "a"), state)
    submit(fed, "a", adapter(1))
    assert fed.version == 1, "a refused half is not remembered"


def test_a_device_trains_on_though_its_edge_server_is_cut_off_for_long(tmp_path: Path) -> None:
    metrics, pool = MetricsWriter(tmp_path / "metrics.jsonl"), tmp_path / "pool"
    fed = started(tmp_path / "adapters", [device("a")], strategy={"name": "gsfs"}, metrics=metrics, pool=pool)
    for number in range(1, 21):
        fed.submit(half("device", "a", f"s/{number}"), device_half(adapter(number), 1))
    assert len(list(pool.iterdir())) == 16
    assert [event["submission"] for event in told(tmp_path, "expired")] == ["s/1", "s/2", "s/3", "s/4"]
    for number in range(1, 21):  # and then all of the edge's come at once
        fed.submit(half("edge", "a", f"s/{number}"), edge_half(adapter(number), 1))
    assert (fed.submissions, fed.refused) == (16, 0)
    fed.close()
    balance = ledger.check(tmp_path)
    assert (balance.accepted, balance.counted, balance.problems) == (16, 16, [])
    dropped = [line["reason"] for line in map(json.loads, (tmp_path / ledger.FILE).open()) if line["event"] == "dropped"]
    assert dropped == ["only its device half came, and newer ones are as many as may wait"] * 4


def test_versions_of_the_halves_are_checked(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 1.0})
    with pytest.raises(RefusedError, match="version 1, but the newest is 0"):
        fed.submit(half("device", "a", version=1), device_half(adapter(1), 1))
    submit(fed, "a", adapter(1))
    submit(fed, "b", adapter(2))
    fed.submit(half("device", "a", "2", version=0), device_half(adapter(1), 1))
    with pytest.raises(RefusedError, match="stems from version 1, the other half from 0"):
        fed.submit(half("edge", "a", "2", version=1), edge_half(adapter(1), 1))


def test_a_half_whose_other_half_never_comes_expires(tmp_path: Path) -> None:
    clock, metrics = Clock(), MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a")], clock, half_expires_s=600, metrics=metrics)
    fed.submit(half("device", "a"), device_half(adapter(1), 1))
    clock.now += 601
    fed.tick()
    assert '"event": "expired"' in (tmp_path / "metrics.jsonl").read_text()
    fed.submit(half("edge", "a"), edge_half(adapter(1), 1))
    assert fed.version == 0
    fed.submit(half("device", "a"), device_half(adapter(1), 1))
    assert fed.version == 1


# What is refused


def poisoned(value: float) -> AdapterState:
    state = adapter(1)
    state[AdapterKey(0, "q", "A")][0, 0] = value
    return device_half(state, 1)


@pytest.mark.parametrize(
    ("sent", "state", "reason"),
    [
        (
            half("device", "a"),
            poisoned(float("nan")),
            "0/q/A of an update of device 'a' .cut 1. holds values that are not finite",
        ),
        (half("device", "a"), poisoned(float("inf")), "not finite"),
        (half("device", "a"), poisoned(-1.1e6), "0/q/A of an update of device 'a' .cut 1. holds values above 1e.06"),
        (half("device", "a"), {}, "0/q/A is missing"),
        (half("device", "a"), OTHER_RANK, "has shape"),
        (half("device", "a", version=5), device_half(adapter(1), 1), "version 5, but the newest is 0"),
        (half("device", "a", submission=""), device_half(adapter(1), 1), "has no id"),
    ],
)
def test_a_bad_update_is_named_counted_and_the_federation_goes_on(
    tmp_path: Path, sent: Any, state: AdapterState, reason: str
) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a")], metrics=metrics)
    with pytest.raises((AdapterError, RefusedError), match=reason):
        fed.submit(sent, state)
    (event,) = told(tmp_path, "refused")
    assert event["device"] == "a" and re.search(reason, event["reason"]) and fed.refused == 1
    submit(fed, "a", adapter(1))
    assert fed.version == 1 and len(told(tmp_path, "refused")) == 1


def test_an_update_that_is_too_old_is_set_aside_with_a_reason_and_its_device_goes_on(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    members = [device("fast"), device("slow")]
    fed = started(tmp_path / "adapters", members, strategy={"quorum": 0.5, "max_lag": 1}, metrics=metrics)
    fed.submit(half("edge", "slow", "begun"), edge_half(adapter(9), 1))
    for version in range(2):
        submit(fed, "fast", adapter(version), str(version), version)
    assert fed.version == 2
    for _ in range(2):
        submit(fed, "slow", adapter(9), "late")  # answered as done, however often it comes
    (event,) = told(tmp_path, "refused")
    assert (event["device"], event["submission"]) == ("slow", "late")
    assert "2 behind the newest: strategy.max_lag is 1" in event["reason"]
    assert fed.version == 2 and fed.submissions == 2
    submit(fed, "slow", adapter(9), "newer", version=1)
    assert fed.version == 3
    fed.submit(half("device", "slow", "begun"), device_half(adapter(9), 1))
    assert fed.version == 4, "of two halves the first decides"


def test_a_full_disk_is_an_error_that_the_sender_may_try_again_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = started(tmp_path / "adapters", [device("a")], pool=tmp_path / "pool")
    with no_file_above(200), pytest.raises(AdapterWriteError):
        fed.submit(half("edge", "a"), edge_half(adapter(1), 1))
    submit(fed, "a", adapter(1))
    assert fed.version == 1 and fed.refused == 0
