from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import HEAD, AdapterKey, device_half, edge_half, total
from sfl.errors import AdapterError, RefusedError, SettingsError
from sfl.fed_server.members import UnknownMemberError
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import (
    LAYERS,
    PLACEMENT,
    Clock,
    adapter,
    device,
    edge,
    federation,
    half,
    same,
    started,
    submit,
)


def aggregations(folder: Path) -> list[dict[str, Any]]:
    """What the metrics tell of the aggregations."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == "aggregate"]


# Agreement


def test_all_labels_are_agreed_when_the_last_device_joins(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2)
    heard: list[int] = []
    fed.on_change = lambda: heard.append(fed.joined)
    fed.join(device("a", labels=("scan",)))
    assert fed.agreement is None
    fed.join(edge())
    fed.join(device("b", labels=("flood", "benign")))
    assert fed.agreement is not None
    assert fed.agreement.labels == ("benign", "flood", "scan")
    assert (fed.agreement.columns, fed.agreement.max_length) == (("proto",), 32)
    assert heard == [1, 1, 2]


def test_labels_in_the_settings_are_agreed_at_once_sorted_as_everywhere(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2, labels=("scan", "benign", "flood"))
    with pytest.raises(RefusedError, match=r"'a'.*'worm'.*benign, flood, scan"):
        fed.join(device("a", labels=("worm",)))
    fed.join(device("a", labels=("benign",)))
    assert fed.agreement is not None and fed.agreement.labels == ("benign", "flood", "scan")
    fed.join(device("b", labels=("flood",)))


def test_a_single_class_is_a_failure_that_says_how_to_mend_it(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    fed.join(device("a", labels=("benign",)))
    assert fed.agreement is None
    assert fed.failure is not None and "only one class, 'benign'" in str(fed.failure) and "`labels`" in str(fed.failure)


def test_a_causal_lm_needs_no_labels(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    fed.join(device("a", task="causal-lm", labels=()))
    assert fed.agreement is not None and fed.agreement.labels == ()


@pytest.mark.parametrize("labels", [("one",), ("a", "a")])
def test_labels_that_cannot_be_are_refused_in_the_settings(tmp_path: Path, labels: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match="two or more different"):
        federation(tmp_path, 1, labels=labels)


# Refusals at the join


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"task": "causal-lm"}, r"'b'.*'causal-lm'.*'a'.*'classification'"),
        ({"model_fingerprint": "xyz"}, r"base model.*xyz against abc"),
        ({"lora": LoraSpec(8, 4.0, 0.0, ("q",))}, r"rank 8 against 2"),
        ({"columns": ("proto", "port")}, r"columns proto, port.*proto"),
        ({"max_length": 64}, r"max_length 64.*32"),
        ({"cut": 0}, r"least cut is 1"),
        ({"examples": 0}, r"no training examples"),
        ({"labels": ()}, r"needs labels"),
    ],
)
def test_a_device_that_differs_is_refused_with_both_values(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    fed = federation(tmp_path, 3)
    fed.join(device("a"))
    with pytest.raises(RefusedError, match=reason):
        fed.join(device("b", **changes))
    assert fed.joined == 1


def test_an_edge_is_compared_too_and_a_device_too_many_is_refused(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    fed.join(device("a"))
    with pytest.raises(RefusedError, match=r"edge server 'edge'.*alpha 9.0 against 4.0"):
        fed.join(edge(lora=LoraSpec(2, 9.0, 0.0, ("q",))))
    with pytest.raises(RefusedError, match=r"the 1 expected devices are a; raise `devices`"):
        fed.join(device("b"))


def test_a_name_is_one_member_until_it_has_gone(tmp_path: Path) -> None:
    clock = Clock()
    fed = federation(tmp_path, 2, clock, away_after_s=60)
    fed.join(device("a"))
    fed.join(device("a"))
    assert fed.joined == 1
    fed.watch_begins("a")
    clock.now += 1000
    for other in (device("a", cut=2), edge("a")):
        with pytest.raises(RefusedError, match="that name"):
            fed.join(other)
    fed.watch_ends("a")
    clock.now += 61
    fed.join(device("a", cut=2))
    assert fed.joined == 1


def test_before_the_agreement_nothing_rests_on_who_has_gone(tmp_path: Path) -> None:
    clock = Clock()
    fed = federation(tmp_path, 2, clock, away_after_s=60)
    fed.join(device("mistyped", model_fingerprint="wrong", max_length=7))
    fed.join(edge(model_fingerprint="wrong"))
    clock.now += 59
    fed.tick()
    with pytest.raises(RefusedError, match="fingerprint abc against wrong"):
        fed.join(device("a"))
    clock.now += 2
    heard: list[int] = []
    fed.on_change = lambda: heard.append(fed.joined)
    fed.tick()
    assert heard == [0]
    for member in (device("a"), edge(), device("b")):
        fed.join(member)
        fed.watch_begins(member.name)
    assert fed.agreement is not None and fed.agreement.max_length == 32
    clock.now += 1000
    fed.watch_ends("b")
    clock.now += 1000
    fed.tick()
    assert fed.joined == 2, "after the agreement a device keeps its place"


def test_a_single_class_is_no_failure_any_more_once_its_devices_have_gone(tmp_path: Path) -> None:
    clock = Clock()
    fed = federation(tmp_path, 1, clock, away_after_s=60)
    fed.join(device("a", labels=("benign",)))
    clock.now += 61
    fed.tick()
    fed.join(device("a"))
    assert fed.failure is None and fed.agreement is not None


def test_a_label_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    clock = Clock()
    fed = started(tmp_path, [device("a")], clock)
    fed.watch_ends("a")
    clock.now += 1000
    with pytest.raises(RefusedError, match="'worm'"):
        fed.join(device("a", labels=("benign", "worm")))


def test_who_has_not_joined_is_told_so(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    for call in (fed.watch_begins, fed.leave, lambda name: fed.fetch(name, 0), lambda name: submit(fed, name, adapter(1))):
        with pytest.raises(UnknownMemberError, match="'nobody' has not joined"):
            call("nobody")
    with pytest.raises(RefusedError, match="is an edge server"):
        fed.leave("edge")


# Version 0


def test_the_first_proposal_is_version_0(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    for member in (edge("e1"), edge("e2")):
        fed.join(member)
    with pytest.raises(RefusedError, match="before the devices had agreed"):
        fed.propose("e1", PLACEMENT, adapter(0))
    fed.join(device("a"))
    with pytest.raises(RefusedError, match="edge servers do"):
        fed.propose("a", PLACEMENT, adapter(0))
    assert fed.propose("e1", PLACEMENT, adapter(0))
    assert fed.propose("e1", PLACEMENT, adapter(0)), "a retry is answered alike"
    assert not fed.propose("e2", PLACEMENT, adapter(5))
    assert fed.version == 0 and same(fed.fetch("a", 0), adapter(0))


def test_a_proposal_that_lacks_a_layer_is_refused(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    fed.join(edge())
    fed.join(device("a"))
    with pytest.raises(AdapterError, match="2/q/A is missing"):
        fed.propose("edge", PLACEMENT, {key: value for key, value in adapter(0).items() if key.layer != 2})
    assert fed.version is None


def test_a_fetch_gives_the_layers_asked_for(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    assert {key.layer for key in fed.fetch("a", 0, 0, 2)} == {0, 1}
    assert {key.layer for key in fed.fetch("edge", 0, 2)} == {2, 3, HEAD}
    with pytest.raises(RefusedError, match="no version 1"):
        fed.fetch("a", 1)


def test_an_edge_gets_nothing_below_its_lowest_cut(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a", cut=2)])
    fed.join(edge("high", cut=2))
    for first in (0, 1):
        with pytest.raises(RefusedError, match=rf"'high' asked for layers from {first} on.*2 as its lowest cut"):
            fed.fetch("high", 0, first)
    assert {key.layer for key in fed.fetch("high", 0, 2)} == {2, 3, HEAD}
    with pytest.raises(RefusedError, match="least cut is 1"):
        fed.join(edge("low", cut=0))


# Updates


def test_one_devices_update_is_the_next_version(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    submit(fed, "a", adapter(1))
    assert fed.version == 1
    assert same(fed.fetch("a", 1), total(adapter(0), adapter(1)))
    assert same(fed.fetch("a", 0), adapter(0))


ARRIVALS = [(name, role) for name in "abc" for role in ("device", "edge")]


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
    with TemporaryDirectory() as folder:
        plain = started(Path(folder), [device(name, examples=10 + ord(name)) for name in "abc"], strategy={"quorum": 1.0})
        for name in "abc":
            submit(plain, name, deltas[name])
        assert same(result, plain.fetch("a", 1))


def test_a_duplicate_stays_one_after_its_aggregation(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    submit(fed, "a", adapter(1))
    fed.submit(half("device", "a"), device_half(adapter(1), 1))
    fed.submit(half("edge", "a"), edge_half(adapter(1), 1))
    assert (fed.version, fed.submissions) == (1, 1)


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


def test_versions_of_the_halves_are_checked(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 1.0})
    with pytest.raises(RefusedError, match="version 1, but the newest is 0"):
        fed.submit(half("device", "a", version=1), device_half(adapter(1), 1))
    submit(fed, "a", adapter(1))
    submit(fed, "b", adapter(2))
    fed.submit(half("device", "a", "2", version=0), device_half(adapter(1), 1))
    with pytest.raises(RefusedError, match="stems from version 1, the other half from 0"):
        fed.submit(half("edge", "a", "2", version=1), edge_half(adapter(1), 1))


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


def test_a_version_that_cannot_be_written_is_tried_again_with_nothing_lost(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    obstacle = tmp_path / "v1"
    obstacle.mkdir()
    submit(fed, "a", adapter(1))
    assert fed.version == 0
    obstacle.rmdir()
    fed.tick()
    assert fed.version == 1 and same(fed.fetch("a", 1), total(adapter(0), adapter(1)))


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


def test_an_aggregation_tells_what_its_updates_were_made_of(tmp_path: Path) -> None:
    metrics = MetricsWriter(tmp_path / "metrics.jsonl")
    fed = started(tmp_path / "adapters", [device("a"), device("b")], strategy={"quorum": 1.0}, metrics=metrics)
    for name, submission, steps in (("a", "1", 3), ("a", "2", 4), ("b", "1", 5)):
        fed.submit(half("edge", name, submission), edge_half(adapter(1), 1))
        fed.submit(half("device", name, submission, steps=steps, examples=8 * steps), device_half(adapter(1), 1))
    (event,) = aggregations(tmp_path)
    assert (event["steps"], event["trained_on"]) == ({"a": 7, "b": 5}, {"a": 56, "b": 40})


def test_what_can_never_be_aggregated_is_not_tried_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = started(tmp_path, [device("a")])
    tries: list[int] = []

    def fail(*_: object) -> None:
        tries.append(1)
        raise AdapterError("no sum")

    monkeypatch.setattr("sfl.fed_server.strategies.base.weighted_sum", fail)
    submit(fed, "a", adapter(1))
    fed.tick()
    assert len(tries) == 1 and fed.version == 0
    monkeypatch.undo()
    submit(fed, "a", adapter(1), "2")
    assert fed.version == 1


# Presence


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


@pytest.mark.parametrize("strategy", ["gsfs", "fedavg"])
def test_a_device_that_has_yet_to_join_is_waited_for_up_to_the_grace(tmp_path: Path, strategy: str) -> None:
    clock = Clock()
    fed = federation(tmp_path, 3, clock, labels=("benign", "scan"), strategy={"name": strategy}, away_after_s=60, join_wait_s=300)
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
    with pytest.raises(RefusedError, match="has finished"):
        fed.join(device("b"))
    fed.join(device("a"))


def test_a_device_that_joins_again_is_back(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 1.0})
    fed.leave("a")
    fed.join(device("a"))
    fed.leave("b")
    assert not fed.finished


# Restart


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
    assert not fed.propose("edge", PLACEMENT, adapter(9))
    submit(fed, "a", adapter(2), version=1)
    assert same(fed.fetch("a", 2), total(total(adapter(0), adapter(1)), adapter(2)))
    with pytest.raises(SettingsError, match="choose another folder"):
        federation(tmp_path, 1, labels=("x", "y"))
