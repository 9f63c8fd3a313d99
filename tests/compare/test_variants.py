"""What is compared: the grid, the named runs, and what is said of those that cannot be."""

from __future__ import annotations

from typing import Any

import pytest

from sfl.compare.settings import CompareSettings
from sfl.compare.variants import variants
from sfl.errors import SettingsError


def made(**changes: Any) -> CompareSettings:
    return CompareSettings.model_validate({"data": "there", **changes})


def test_by_default_gsfs_is_beside_fedavg_and_centralised() -> None:
    found = variants(made())
    assert [variant.name for variant in found] == ["centralised", "fedavg", "gsfs"]
    assert [variant.centralised for variant in found] == [True, False, False]
    assert [variant.name for variant in variants(made(run=[{"name": "mine", "strategy": "fedavg"}]))] == ["mine"]


def test_strategies_with_merges_are_a_grid() -> None:
    found = variants(made(strategies=["centralised", "fedavg", "gsfs"], merges=["average", "fedex"]))
    names = ["centralised", "fedavg, average", "fedavg, fedex", "gsfs, average", "gsfs, fedex"]
    assert [variant.name for variant in found] == names
    assert found[2].fed_settings(2, ("x", "y")).merge == "fedex"


def test_a_run_changes_what_it_names_and_no_more() -> None:
    run = {"name": "other", "strategy": {"name": "gsfs", "quorum": 0.9}, "lora": {"rank": 4}, "cuts": [1, 3]}
    shared = {"lora": {"rank": 16, "alpha": 32}, "steps": 7, "fed": "strategy.local_steps=5,strategy.quorum=0.2"}
    own, plain = variants(made(strategies=["fedavg"], run=[run], **shared))[::-1]
    assert (own.settings.lora.rank, own.settings.lora.alpha, own.settings.cuts, own.settings.steps) == (4, 32.0, (1, 3), 7)
    assert (plain.settings.lora.rank, plain.settings.cuts) == (16, (2,))
    fed = own.fed_settings(3, ("x", "y"))
    assert (fed.strategy.name, fed.strategy.quorum, fed.strategy.local_steps) == ("gsfs", 0.9, 5)
    assert (fed.devices, fed.labels) == (3, ("x", "y"))
    assert plain.fed_settings(3, ("x", "y")).strategy.quorum == 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["gsfss"]}, "run 'gsfss': strategy.name = 'gsfss': should be 'gsfs'"),
        ({"run": [{"name": "x", "stategy": "gsfs"}]}, "run 'x' has the unknown setting 'stategy'"),
        ({"run": [{"strategy": "gsfs"}]}, "has no name"),
        ({"run": [{"name": "x", "strategy": "gsfs", "devices": 3}]}, "unknown setting 'devices'"),
        ({"run": [{"name": "x"}, {"name": "x"}]}, "two runs have the name 'x'"),
        ({"run": [{"name": "x", "strategy": {"name": "gsfs", "qourum": 1}}]}, "strategy.qourum"),
        ({"run": [{"name": "x", "steps": 0}]}, "run 'x': steps = 0"),
    ],
)
def test_what_cannot_be_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        for variant in variants(made(**changes)):
            variant.fed_settings(2, ("x", "y"))


def test_a_table_as_a_flag_has_names_and_values() -> None:
    with pytest.raises(ValueError, match="'quorum' is no NAME=VALUE"):
        made(fed="strategy.local_steps=5,quorum")
