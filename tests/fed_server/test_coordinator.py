from __future__ import annotations

import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.adapters.layout import LoraSpec
from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import HEAD, AdapterKey, AdapterState, device_half, edge_half, total
from sfl.errors import AdapterError, RefusedError, SettingsError, UnknownMemberError
from sfl.fed_server import server_state
from sfl.fed_server.aggregation import Remembered
from sfl.fed_server.strategies import Memory
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
    no_file_above,
    same,
    started,
    submit,
)


def told(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The events of one kind in the metrics."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] == kind]


def aggregations(folder: Path) -> list[dict[str, Any]]:
    """What the metrics tell of the aggregations."""
    return told(folder, "aggregate")


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
    assert not list(pool.iterdir())
    fed.submit(half("device", "a", "2", 1), device_half(adapter(1), 1))
    next(pool.glob("*-device.safetensors")).write_bytes(b"the disk is failing")
    fed.leave("b")
    fed.submit(half("edge", "a", "2", 1), edge_half(adapter(1), 1))
    assert fed.version == 2 and same(fed.fetch("a", 2), fed.fetch("a", 1)), "unchanged, but there: devices may wait for it"
    submit(fed, "a", adapter(1), "3", version=2)
    assert fed.version == 3 and fed.refused == 2


def test_a_full_disk_is_an_error_that_the_sender_may_try_again_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = started(tmp_path / "adapters", [device("a")], pool=tmp_path / "pool")
    with no_file_above(200), pytest.raises(AdapterWriteError):
        fed.submit(half("edge", "a"), edge_half(adapter(1), 1))
    submit(fed, "a", adapter(1))
    assert fed.version == 1 and fed.refused == 0


# Bad input


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


# Ranks


def of_rank(state: AdapterState, rank: int) -> AdapterState:
    parts = {"A": lambda value: value[:rank], "B": lambda value: value[:, :rank]}
    return {key: parts.get(key.part, lambda value: value)(value) for key, value in state.items()}


def test_devices_of_different_ranks_get_and_send_their_own(tmp_path: Path) -> None:
    members = [device("a", rank=1), device("b", cut=2)]
    fed = started(tmp_path, members, strategy={"name": "fedavg"})
    assert same(fed.fetch("a", 0, rank=1), of_rank(adapter(0), 1)) and same(fed.fetch("b", 0), adapter(0))
    assert same(fed.fetch("edge", 0, 1, rank=1), edge_half(of_rank(adapter(0), 1), 1))
    with pytest.raises(AdapterError, match=r"shape \(2, 3\), expected \(1, 3\)"):
        submit(fed, "a", adapter(1))
    submit(fed, "a", of_rank(adapter(1), 1), "2")
    submit(fed, "b", adapter(2), cut=2)
    result = fed.fetch("b", 1)
    small, key = of_rank(adapter(1), 1), AdapterKey(0, "q", "A")
    np.testing.assert_allclose(result[key][:1], adapter(0)[key][:1] + 0.5 * small[key] + 0.5 * adapter(2)[key][:1], rtol=1e-5)
    np.testing.assert_allclose(result[key][1:], adapter(0)[key][1:] + 0.5 * adapter(2)[key][1:], rtol=1e-5)
    with pytest.raises(RefusedError, match="no device can have rank 3"):
        fed.fetch("b", 0, rank=3)


def test_a_rank_above_that_of_the_settings_is_refused(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2)
    with pytest.raises(RefusedError, match=r"rank 3 is above the 2 of the LoRA settings.*`lora.rank`"):
        fed.join(device("a", rank=3))


def test_what_needs_one_rank_refuses_others(tmp_path: Path) -> None:
    shared = federation(tmp_path, 2, strategy={"name": "splitlora"})
    shared.join(device("a", rank=2))
    with pytest.raises(RefusedError, match=r"has rank 1 and the others 2.* strategy needs one rank"):
        shared.join(device("c", rank=1))


def test_an_adapter_that_all_devices_share_at_the_edge_has_one_edge_server(tmp_path: Path) -> None:
    clock = Clock()
    shared, any_number = federation(tmp_path, 2, clock, strategy={"name": "splitlora"}), federation(tmp_path, 2, clock)
    for fed in (shared, any_number):
        fed.join(edge("first"))
        fed.join(edge("first"))
        fed.join(device("a"))
    any_number.join(edge("second"))
    with pytest.raises(RefusedError, match=r"'second' cannot join: edge server 'first' is there.* one adapter at the edge"):
        shared.join(edge("second"))
    clock.now += 61
    shared.join(edge("second"))


def test_a_device_that_comes_back_with_another_rank_leaves_its_halves_behind(tmp_path: Path) -> None:
    clock = Clock()
    fed = started(tmp_path, [device("a"), device("b")], clock, strategy={"quorum": 1.0})
    submit(fed, "a", adapter(1), "1")
    fed.submit(half("edge", "a", "2"), edge_half(adapter(1), 1))
    fed.watch_ends("a")
    clock.now += 61
    fed.join(device("a", rank=1))
    fed.submit(half("device", "a", "2"), device_half(of_rank(adapter(1), 1), 1))
    submit(fed, "a", of_rank(adapter(1), 1), "3")
    submit(fed, "b", adapter(2))
    assert fed.version == 1, "what it sent at rank 2 is in it"
    submit(fed, "b", adapter(2), "2", version=1)
    assert fed.version == 2, "and what it sent at rank 1 in the next"


def test_under_ffa_updates_have_no_a(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")], merge="ffa")
    with pytest.raises(AdapterError, match="0/q/A is unknown"):
        submit(fed, "a", adapter(1))
    submit(fed, "a", {key: value for key, value in adapter(1).items() if key.part != "A"}, "2")
    for key, value in fed.fetch("a", 1).items():
        expected = adapter(0)[key] + (0 if key.part == "A" else adapter(1)[key])
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("merge", ["fedex", "flora", "flexlora"])
def test_every_merge_makes_versions_that_a_restarted_server_goes_on_from(tmp_path: Path, merge: str) -> None:
    members = [device("a"), device("b", rank=1)]
    fed = started(tmp_path, members, strategy={"name": "fedavg"}, merge=merge)
    for version in range(2):
        submit(fed, "a", adapter(version + 1), str(version), version)
        submit(fed, "b", of_rank(adapter(version + 5), 1), str(version), version)
    again = federation(tmp_path, 2, strategy={"name": "fedavg"}, merge=merge)
    for member in [*members, edge()]:
        again.join(member)
    assert again.version == 2 and same(again.fetch("b", 2, rank=1), fed.fetch("b", 2, rank=1))
    frozen = [key for key in again.fetch("a", 2) if key.part == "frozen_A"]
    assert bool(frozen) == (merge != "flexlora")


def test_where_versions_have_factors_of_their_own_a_devices_updates_of_two_are_not_mixed(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 1.0}, merge="flora")
    for name in "ab":
        submit(fed, name, adapter(1))
    submit(fed, "a", adapter(1), "late", version=0)
    submit(fed, "a", adapter(1), "new", version=1)
    submit(fed, "b", adapter(1), "2", version=1)
    assert fed.version == 2
    submit(fed, "b", adapter(1), "3", version=2)
    assert fed.version == 3 and fed.submissions == 6


# Robust rules, privacy and what is remembered


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
    assert fed.version == 2 and same(fed.fetch("a", 2), fed.fetch("a", 1)), "there will never be three again"
    assert [event["device"] for event in told(tmp_path, "refused")] == ["a"] and not fed.finished


def test_a_robust_rule_does_not_wait_for_ever(tmp_path: Path) -> None:
    clock, metrics = Clock(), MetricsWriter(tmp_path / "metrics.jsonl")
    robust, strategy = {"rule": "median", "attackers": 1}, {"quorum": 0.3, "round_timeout_s": 30}
    members = [device(name) for name in "abc"]
    fed = started(tmp_path / "adapters", members, clock, strategy=strategy, robust=robust, metrics=metrics)
    for version in range(2):
        submit(fed, "a", adapter(1), str(version), version)
        clock.now += 29
        fed.tick()
        assert fed.version == version
        clock.now += 2
        fed.tick()
        assert fed.version == version + 1 and same(fed.fetch("a", version + 1), adapter(0))
    assert [event["device"] for event in told(tmp_path, "refused")] == ["a", "a"]
    assert "median needs 3 updates" in told(tmp_path, "refused")[0]["reason"]


def test_a_robust_rule_may_be_told_not_to_wait(tmp_path: Path) -> None:
    robust = {"rule": "median", "attackers": 1, "too_few": "refuse"}
    fed = started(tmp_path, [device(name) for name in "abc"], strategy={"quorum": 0.3}, robust=robust)
    submit(fed, "a", adapter(1))
    assert fed.version == 1 and same(fed.fetch("a", 1), adapter(0)) and fed.refused == 1


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
def test_moments_that_do_not_fit_their_version_stop_the_start(tmp_path: Path, moments: Memory, reason: str) -> None:
    submit(started(tmp_path, [device("a")], strategy={"name": "fedadam"}), "a", adapter(1))
    (content,) = server_state.files(Remembered(moments), "fedadam").values()
    (tmp_path / "v1" / server_state.MOMENTS).write_bytes(content)
    (tmp_path / "v1" / "SHA256SUMS").unlink()
    with pytest.raises(AdapterError, match=f"server_state.safetensors of version 1 does not belong to it: .*{reason}.*delete"):
        federation(tmp_path, 1, strategy={"name": "fedadam"})


@pytest.mark.parametrize("name", ["server_state.safetensors", "privacy.json"])
def test_a_damaged_memory_stops_the_start(tmp_path: Path, name: str) -> None:
    submit(started(tmp_path, [device("a")], strategy={"name": "fedadam"}), "a", adapter(1))
    (tmp_path / "v1" / name).write_bytes(b"no")
    (tmp_path / "v1" / "SHA256SUMS").unlink()
    with pytest.raises(AdapterError, match=f"{name} of version 1 is damaged"):
        federation(tmp_path, 1, strategy={"name": "fedadam"})


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


# Presence


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
    fed.join(edge("other"))
    assert fed.propose("edge", PLACEMENT, adapter(0)) and not fed.propose("other", PLACEMENT, adapter(9))
    submit(fed, "a", adapter(2), "2", version=1)
    assert same(fed.fetch("a", 2), total(total(adapter(0), adapter(1)), adapter(2)))
    with pytest.raises(SettingsError, match="choose another folder"):
        federation(tmp_path, 1, labels=("x", "y"))
