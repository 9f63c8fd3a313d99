from __future__ import annotations

from collections.abc import Mapping
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sfl.errors import RefusedError
from sfl.fed_server.logit_adjustment import logit_offsets
from sfl.settings import FedSettings
from tests.fed_server.made import device, edge, federation

LABELS = ("benign", "flood", "scan")
OWN = st.dictionaries(st.sampled_from(LABELS), st.integers(1, 10**6), min_size=1)
COUNTS = st.dictionaries(st.sampled_from("abcd"), OWN, min_size=1)


def test_by_hand() -> None:
    offsets = logit_offsets({"a": {"benign": 30}, "b": {"benign": 45, "scan": 25}}, LABELS)
    assert offsets["a"] == pytest.approx((log((30 + 0.75) / 31 / 0.75), 0, log(0.25 / 31 / 0.25)))
    assert offsets["b"] == pytest.approx((log((45 + 0.75) / 71 / 0.75), 0, log((25 + 0.25) / 71 / 0.25)))


@given(COUNTS)
def test_the_best_for_all_is_with_the_offsets_the_best_for_each(counts: Mapping[str, Mapping[str, int]]) -> None:
    """A classifier that answers with the shares of all devices answers with a device's own once the offsets are added."""
    total = sum(sum(own.values()) for own in counts.values())
    everywhere = [sum(own.get(label, 0) for own in counts.values()) / total for label in LABELS]
    for name, offsets in logit_offsets(counts, LABELS).items():
        raised = np.array([share * exp(offset) for share, offset in zip(everywhere, offsets)])
        size = sum(counts[name].values())
        wanted = [(counts[name].get(label, 0) + share) / (size + 1) for label, share in zip(LABELS, everywhere)]
        assert raised / raised.sum() == pytest.approx(wanted)


def test_half_of_it_by_hand() -> None:
    offsets = logit_offsets({"a": {"benign": 30}, "b": {"benign": 45, "scan": 25}}, LABELS, 0.5)
    assert offsets["a"] == pytest.approx((log((30.75 / 31 + 0.75) / 2 / 0.75), 0, log((0.25 / 31 + 0.25) / 2 / 0.25)))


@given(COUNTS)
def test_devices_with_the_labels_of_all_have_no_offsets(counts: Mapping[str, Mapping[str, int]]) -> None:
    alike = {name: next(iter(counts.values())) for name in "abc"}
    assert all(offsets == pytest.approx((0, 0, 0)) for offsets in logit_offsets(alike, LABELS).values())


def told(tmp_path: Path, **settings: Any) -> dict[str, list[float]]:
    fed = federation(tmp_path, 2, labels=LABELS, **settings)
    fed.join(edge())
    fed.join(device("a", labels=("benign", "scan"), label_counts=(3, 1), examples=4))
    assert not fed.policy("a").logit_offsets, "not before all are there"
    fed.join(device("b", labels=("scan",), label_counts=(4,), examples=4))
    return {name: list(fed.policy(name).logit_offsets) for name in "ab"}


def test_devices_are_told_once_all_are_there(tmp_path: Path) -> None:
    offsets = told(tmp_path)
    expected = logit_offsets({"a": {"benign": 3, "scan": 1}, "b": {"scan": 4}}, LABELS, 0.7)
    assert offsets == {name: pytest.approx(values, rel=1e-6) for name, values in expected.items()}


def test_only_where_the_strategy_asks_for_it(tmp_path: Path) -> None:
    assert told(tmp_path, strategy={"name": "fedavg"}) == {"a": [], "b": []}


def test_who_does_not_tell_its_counts_has_no_offsets(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2)
    fed.join(device("a", labels=("benign",), label_counts=(4,), examples=4))
    fed.join(device("b", labels=("scan",), examples=4))
    assert list(fed.policy("a").logit_offsets) == [0, 0] and not fed.policy("b").logit_offsets


@pytest.mark.parametrize("counts", [(3,), (2, 1)])
def test_counts_that_cannot_be_are_refused(tmp_path: Path, counts: tuple[int, ...]) -> None:
    with pytest.raises(RefusedError, match="label counts add up to 3, and it has 2 labels and 4 training examples"):
        federation(tmp_path, 1).join(device("a", labels=("benign", "scan"), label_counts=counts, examples=4))


def test_with_privacy_it_is_off_unless_asked_for() -> None:
    privacy = {"clip": 1.0, "noise": 1.0}
    assert FedSettings.model_validate({"devices": 2}).strategy.logit_adjustment
    assert not FedSettings.model_validate({"devices": 2, "privacy": privacy}).strategy.logit_adjustment
    with pytest.raises(ValidationError, match=r"strategy\.logit_adjustment goes by how many of each label"):
        FedSettings.model_validate({"devices": 2, "privacy": privacy, "strategy": {"logit_adjustment": 0.5}})
