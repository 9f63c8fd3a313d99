"""What each attack does, and to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.compare.attackers import Attackers
from sfl.compare.division import Division, Source
from sfl.compare.settings import AttackSettings, CompareSettings
from sfl.errors import SettingsError
from sfl.v1.federation_pb2 import DEVICE, EDGE, Role, UpdateHeader
from tests.flows import write_texts

KEY = AdapterKey(0, "query", "A")
UPDATE: AdapterState = {KEY: np.array([[3.0, -4.0]] * 200, dtype=np.float32)}


@pytest.fixture
def division(tmp_path: Path) -> Division:
    path = write_texts(tmp_path / "texts.txt", 400)
    return Source(CompareSettings(data=path, devices=4)).division(0)


def attackers(division: Division, seed: int = 0, **values: Any) -> Attackers:
    return Attackers(AttackSettings(**values), division, seed)


def sent(found: Attackers, device: str, half: Role = DEVICE) -> np.ndarray:
    return found.tamper(UpdateHeader(device=device, half=half), UPDATE)[KEY]


def test_who_attacks_is_drawn_by_the_seed_or_named(division: Division) -> None:
    drawn = {attackers(division, seed, kind="scaling", devices=2).names for seed in range(8)}
    assert all(len(set(names)) == 2 for names in drawn) and len(drawn) > 1
    assert attackers(division, 3, kind="scaling", devices=2).names == attackers(division, 3, kind="scaling", devices=2).names
    assert attackers(division, kind="scaling", names=("device-3",)).names == ("device-3",)


def test_updates_are_turned_scaled_or_replaced_by_noise(division: Division) -> None:
    only = {"names": ("device-2",)}
    for kind, factor in (("sign-flip", -1.0), ("scaling", 10.0), ("label-flip", 1.0), ("backdoor", 1.0)):
        found = attackers(division, kind=kind, **only)
        assert np.array_equal(sent(found, "device-2"), factor * UPDATE[KEY])
        assert np.array_equal(sent(found, "device-1"), UPDATE[KEY])
    assert np.array_equal(sent(attackers(division, kind="sign-flip", strength=3, **only), "device-2"), -3 * UPDATE[KEY])
    noise = attackers(division, kind="gaussian", strength=2, **only)
    first, second = sent(noise, "device-2"), sent(noise, "device-2")
    assert not np.array_equal(first, second) and np.array_equal(sent(noise, "device-1"), UPDATE[KEY])
    assert np.std(first) == pytest.approx(2 * np.sqrt(12.5), rel=0.15)
    assert np.array_equal(sent(attackers(division, kind="gaussian", strength=2, **only), "device-2"), first)


def test_an_attacker_may_be_limited_to_its_own_half(division: Division) -> None:
    own = attackers(division, kind="sign-flip", halves="device", names=("device-2",))
    assert np.array_equal(sent(own, "device-2", EDGE), UPDATE[KEY]) and np.array_equal(sent(own, "device-2"), -UPDATE[KEY])
    assert np.array_equal(sent(attackers(division, kind="sign-flip", names=("device-2",)), "device-2", EDGE), -UPDATE[KEY])


def test_labels_are_exchanged_in_training_alone(division: Division) -> None:
    found = attackers(division, kind="label-flip", names=("device-2",)).examples(division)
    following = {"Benign": "C&C", "C&C": "DDoS", "DDoS": "Benign"}
    before, after = division.splits["device-2"], found["device-2"]
    assert [example.label for example in after.train] == [following[example.label] for example in before.train]
    assert after.test == before.test and found["device-1"] is division.splits["device-1"]


def test_a_backdoor_has_its_trigger_and_its_target(division: Division) -> None:
    made = attackers(division, kind="backdoor", names=("device-2",), trigger="open now", target="DDoS", poisoned=0.5)
    before, after = division.splits["device-2"].train, made.examples(division)["device-2"].train
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert all(example.label == "DDoS" and example.text.endswith(" open now") for example in changed)
    assert 0.3 < len(changed) / len(before) < 0.7
    triggered = made.triggered(division.splits["device-1"].test)
    assert triggered and all(example.label != "DDoS" and example.text.endswith(" open now") for example in triggered)
    assert attackers(division, kind="backdoor", devices=1).target == division.majority


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "scaling"}, "an attack needs both"),
        ({"devices": 1}, "an attack needs both"),
        ({"kind": "scaling", "devices": 4}, "leave nobody to attack"),
        ({"kind": "scaling", "names": ("device-9",)}, "'device-9', which is no device"),
        ({"kind": "scaling", "names": ("device-1",), "devices": 2}, "leave one of them out"),
        ({"kind": "backdoor", "devices": 1, "target": "Torii"}, "'Torii' is no label"),
    ],
)
def test_attacks_that_cannot_be(division: Division, values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        attackers(division, **values)


def test_no_attackers_may_be_said_beside_an_attack(division: Division) -> None:
    assert attackers(division, kind="sign-flip", devices=0).names == ()
