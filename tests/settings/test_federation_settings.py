from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from sfl.cli.load_settings import as_toml, load
from sfl.federation_settings import StrategySettings
from sfl.settings import FedSettings


def fed(**changes: Any) -> FedSettings:
    return FedSettings.model_validate({"devices": 9, **changes})


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("gsfs", {"weights": "share", "keep_progress": True, "staleness": 0, "proximal": 0, "max_lag": 0}),
        ("gsfs", {"quorum": 0.05, "quorum_of": "devices", "network": False, "reach": False, "feedback": False}),
        ("gsfs", {"min_steps": 8, "max_steps": None, "most_steps": 16, "pace": 2 / 3}),
        ("gsfs-printed", {"quorum": 0.6, "min_steps": 1, "max_steps": 0, "most_steps": 0, "pace": 0}),
        ("fedavg", {"weights": "examples", "keep_progress": False, "final_upload": True, "staleness": 0, "proximal": 0}),
        ("fedprox", {"weights": "examples", "keep_progress": False, "proximal": 0.01}),
        ("fedavgm", {"weights": "examples", "server_rate": 0.1, "server_momentum": 0.9}),
        ("fedadam", {"weights": "examples", "server_rate": 0.01, "server_tau": 1e-3}),
        ("fedbuff", {"weights": "equal", "keep_progress": False, "staleness": 0.5}),
        ("splitlora", {"weights": "examples", "keep_progress": False}),
    ],
)
def test_each_strategy_has_its_own_defaults_which_can_be_set(name: str, own: dict[str, Any]) -> None:
    settings = StrategySettings.model_validate({"name": name})
    assert {key: getattr(settings, key) for key in own} == own
    assert StrategySettings.model_validate({"name": name, "staleness": 2, "proximal": 1.5}).proximal == 1.5


@pytest.mark.parametrize(
    ("chosen", "most"),
    [
        ({}, 16),
        ({"min_steps": 50}, 100),
        ({"min_steps": 50, "max_steps": None}, 100),
        ({"min_steps": 50, "max_steps": 50}, 50),
        ({"min_steps": 50, "max_steps": 0}, 0),
        ({"name": "gsfs-printed", "min_steps": 50}, 0),
        ({"name": "gsfs-printed", "min_steps": 50, "max_steps": None}, 0),
    ],
    ids=str,
)
def test_most_steps_left_out_are_twice_the_least_and_0_is_no_bound(chosen: dict[str, Any], most: int, tmp_path: Path) -> None:
    settings = fed(strategy=chosen)
    assert settings.strategy.most_steps == most
    (tmp_path / "fed.toml").write_text(as_toml(settings))
    assert load(FedSettings, tmp_path / "fed.toml", environment={}) == settings, "and as a file they say the same"


def test_most_steps_follow_a_flag_that_changes_the_least_of_a_printed_file(tmp_path: Path) -> None:
    (tmp_path / "fed.toml").write_text(as_toml(fed()))
    settings = load(FedSettings, tmp_path / "fed.toml", ["--strategy.min-steps", "60"], environment={})
    assert settings.strategy.most_steps == 120


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strategy": {"name": "fedbuff", "weights": "share"}}, ["fedbuff weighs by equal", "strategy.weights 'share'"]),
        ({"strategy": {"name": "fedadam", "weights": "share"}}, ["fedadam weighs by examples"]),
        ({"strategy": {"name": "fedavg", "network": True}}, ["strategy.network", "strategy.name is fedavg"]),
        ({"strategy": {"name": "fedavg", "reach": True}}, ["strategy.reach", "strategy.name is fedavg"]),
        ({"strategy": {"name": "fedbuff", "feedback": True}}, ["strategy.feedback", "fedbuff"]),
        ({"strategy": {"feedback": True, "validate_every": 0}}, ["strategy.feedback", "strategy.validate_every"]),
        ({"strategy": {"max_steps": 5, "min_steps": 6}}, ["strategy.max_steps 5", "strategy.min_steps 6"]),
        ({"merge": "flora", "strategy": {"keep_progress": True}}, ["merge flora", "strategy.keep_progress"]),
        ({"merge": "flexlora", "strategy": {"name": "fedyogi"}}, ["merge flexlora", "fedyogi"]),
        ({"merge": "fedex", "strategy": {"name": "fedadam"}}, ["merge fedex", "fedadam"]),
        ({"merge": "flora", "robust": {"rule": "median"}}, ["merge flora", "robust.rule median"]),
        ({"merge": "flora", "robust": {"rule": "bulyan"}}, ["merge flora", "robust.rule bulyan"]),
        ({"merge": "hetlora", "privacy": {"clip": 1}}, ["privacy.clip", "merge hetlora"]),
        ({"robust": {"rule": "krum"}, "privacy": {"clip": 1}}, ["robust.rule krum", "privacy.clip"]),
        ({"robust": {"rule": "norm-clip"}, "privacy": {"clip": 1}}, ["robust.rule norm-clip", "privacy.clip", "robust.norm"]),
        ({"privacy": {"noise": 1}}, ["privacy.noise", "privacy.clip"]),
        ({"privacy": {"clip": 1, "epsilon": 3}}, ["privacy.epsilon", "privacy.noise"]),
        ({"strategy": {"name": "splitlora"}, "merge": "flora"}, ["splitlora", "merge flora"]),
        ({"strategy": {"name": "splitlora"}, "robust": {"rule": "norm-clip"}}, ["splitlora", "robust.rule norm-clip"]),
        ({"strategy": {"name": "splitlora"}, "privacy": {"clip": 1}}, ["splitlora", "privacy.clip"]),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused_with_both_names(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        fed(**changes)
    for text in named:
        assert text in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": {"staleness": -1}},
        {"strategy": {"staleness": math.inf}},
        {"strategy": {"max_lag": -1}},
        {"strategy": {"proximal": -0.1}},
        {"strategy": {"buffer": 0}},
        {"strategy": {"server_rate": 0}},
        {"strategy": {"server_momentum": 1}},
        {"strategy": {"server_tau": 0}},
        {"strategy": {"network_budget": 0}},
        {"strategy": {"feedback_lowest": 1.1}},
        {"strategy": {"quorum_of": "submissions"}},
        {"strategy": {"name": "unheard-of"}},
        {"merge": "unheard-of"},
        {"robust": {"rule": "unheard-of"}},
        {"robust": {"attackers": -1}},
        {"privacy": {"delta": 0}},
        {"privacy": {"clip": -1}},
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        fed(**changes)


def test_progress_is_kept_by_default_where_the_merge_can_add_it() -> None:
    assert fed().strategy.keep_progress and fed(merge="fedex").strategy.keep_progress
    assert not fed(merge="flora").strategy.keep_progress
    assert not FedSettings(devices=1, merge="flexlora", strategy=StrategySettings(name="gsfs")).strategy.keep_progress


def test_what_goes_together_is_taken() -> None:
    fed(merge="ffa", privacy={"clip": 1, "noise": 1, "epsilon": 8}, robust={"rule": "norm-clip", "norm": 1})
    fed(merge="flora", robust={"rule": "multi-krum", "attackers": 2})
    fed(strategy={"name": "fedadam"}, merge="hetlora")
    fed(strategy={"network": True, "reach": True, "feedback": True, "max_steps": 50, "quorum_of": "examples"})


def test_all_of_it_survives_being_written_as_a_file(tmp_path: Path) -> None:
    arguments = ["--devices=7", "--strategy.name=fedbuff", "--strategy.buffer=5", "--merge", "flora"]
    arguments += ["--robust.rule", "krum", "--robust.attackers", "2"]
    settings = load(FedSettings, None, arguments, environment={})
    assert (settings.strategy.buffer, settings.merge, settings.robust.attackers) == (5, "flora", 2)
    (tmp_path / "fed.toml").write_text(as_toml(settings))
    assert load(FedSettings, tmp_path / "fed.toml", environment={}) == settings
