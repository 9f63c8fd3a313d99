from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import HEAD
from sfl.errors import AdapterError, RefusedError, SettingsError, UnknownMemberError
from tests.fed_server.made import PLACEMENT, Clock, adapter, device, edge, federation, same, started, submit

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


@pytest.mark.parametrize("order", ["ab", "ba"])
def test_how_far_apart_uploads_are_does_not_depend_on_who_came_first(tmp_path: Path, order: str) -> None:
    members = {"a": device("a", examples=30), "b": device("b", examples=10)}
    fed = federation(tmp_path, 2, labels=("benign", "scan"), strategy={"min_steps": 10, "max_steps": 30, "pace": 1.0})

    def told(name: str) -> tuple[int, int]:
        triggered = fed.policy(name).triggered
        return triggered.min_steps, triggered.max_steps

    changes: list[int] = []
    fed.on_change = lambda: changes.append(fed.joined)
    fed.join(members[order[0]])
    assert told(order[0]) == (10, 30), "as the settings say, until all are there"
    fed.join(members[order[1]])
    assert (told("a"), told("b")) == ((7, 20), (20, 60)) and changes == [1, 2]
    fed.tick()
    assert changes == [1, 2], "nothing new"


def test_devices_are_paced_without_those_that_never_came(tmp_path: Path) -> None:
    clock, changes = Clock(), list[float]()
    fed = federation(tmp_path, 3, clock, labels=("benign", "scan"), strategy={"min_steps": 10, "pace": 1.0}, join_wait_s=30)
    fed.join(device("a", examples=30))
    fed.join(device("b", examples=10))
    fed.on_change = lambda: changes.append(clock.now)
    for _ in range(5):
        clock.now += 9
        fed.tick()
    assert changes == [136.0], "watchers are told once, when it is so"
    assert (fed.policy("a").triggered.min_steps, fed.policy("b").triggered.min_steps) == (7, 20)
    fed.join(device("c", examples=80))
    assert [fed.policy(name).triggered.min_steps for name in "abc"] == [13, 40, 5], "who comes late counts from then on"


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


# Refusals


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


def test_a_device_that_comes_back_changed_is_not_told_that_it_differs_from_itself(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    fed.join(device("a"))
    fed.leave("a")
    with pytest.raises(
        RefusedError, match=r"^device 'a' \(cut 1\) has max_length 64, the one that joined under this name before has 32$"
    ):
        fed.join(device("a", max_length=64))
    with pytest.raises(
        RefusedError, match=r"^device 'a' .*LoRA settings than the one that joined under this name before: rank 8"
    ):
        fed.join(device("a", lora=LoraSpec(8, 4.0, 0.0, ("q",))))
    fed.join(edge())
    with pytest.raises(RefusedError, match=r"than edge server 'edge': rank 8"):
        fed.join(device("a", lora=LoraSpec(8, 4.0, 0.0, ("q",))))


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


# Fetching


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


def test_nobody_believes_any_number_of_examples(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2)
    fed.join(edge())
    with pytest.raises(RefusedError, match="no device has 18446744073709551615 training examples"):
        fed.join(device("a", examples=2**64 - 1))
