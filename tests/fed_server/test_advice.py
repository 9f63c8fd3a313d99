"""What is said at the start, and that it is so."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.fed_server.aggregation import Aggregation
from sfl.settings import FedSettings
from tests.fed_server.made import adapter, federation, update

NOISE = {"clip": 1.0, "noise": 2.0}


@pytest.mark.parametrize(
    ("devices", "strategy", "said"),
    [
        (20, {}, "1 of 20 devices make one: all in all that is 4.5 times .*; raise strategy.quorum"),
        (100, {}, "5 of 100 devices make one: all in all that is 4.5 times"),
        (4, {}, "1 of 4 devices make one: all in all that is 2.0 times"),
        (20, {"name": "fedbuff"}, "3 of 20 devices make one: all in all that is 2.6 times .*; raise strategy.buffer"),
        (20, {"quorum": 0.6}, None),
        (3, {}, "1 of 3 devices make one: all in all that is 1.7 times"),
        (3, {"quorum": 0.5}, None),
        (1, {}, None),
        (20, {"name": "fedavg"}, None),
    ],
)
def test_much_noise_is_said_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, devices: int, strategy: dict[str, Any], said: str | None
) -> None:
    pytest.importorskip("dp_accounting")
    federation(tmp_path, devices, strategy=strategy, privacy=NOISE)
    lines = [record.message for record in caplog.records if "privacy.noise is added to every version" in record.message]
    assert [bool(re.search(said or "", line)) for line in lines] == [True] * (said is not None)
    caplog.clear()
    federation(tmp_path, devices, strategy=strategy, privacy={"clip": 1.0})
    assert "every version" not in caplog.text, "without noise there is none"


def test_a_robust_rule_that_waits_for_updates_makes_noise_less(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("dp_accounting")
    for attackers in (1, 3):
        robust = {"rule": "norm-clip", "attackers": attackers, "norm": 1.0}
        federation(tmp_path, 20, privacy=NOISE, robust=robust)
    assert "3 of 20 devices make one" in caplog.text and "7 of 20" not in caplog.text


def test_updates_that_are_versions_of_their_own_have_as_much_more_noise(tmp_path: Path) -> None:
    """Of 16 devices with equal examples: four times, in the sum of the versions."""
    pytest.importorskip("dp_accounting")
    updates = [update(f"d{number:02d}", number) for number in range(16)]

    def noise(pools: list[list[Any]]) -> float:
        found = []
        for seed in range(30):
            with_noise, without = (
                Aggregation(FedSettings.model_validate({"devices": 16, "privacy": {"clip": 1.0, "noise": level, "seed": seed}}))
                for level in (2.0, 0.0)
            )
            state, clean = adapter(0), adapter(0)
            for pool in pools:
                state, clean = with_noise.aggregate(state, pool, 16).state, without.aggregate(clean, pool, 16).state
            found += [float(np.mean(np.square(state[key] - clean[key]))) for key in state]
        return float(np.sqrt(np.mean(found)))

    one, each = noise([updates]), noise([[one] for one in updates])
    assert one == pytest.approx(2.0 / 16, rel=0.1) and each == pytest.approx(4 * one, rel=0.1)


@pytest.mark.parametrize(
    ("devices", "strategy", "said"),
    [
        (20, {"reach": True}, True),
        (21, {"reach": True}, False),
        (5, {"reach": True, "quorum": 0.6}, False),
        (5, {"reach": True, "quorum_of": "examples"}, False),
        (5, {}, False),
    ],
)
def test_a_reach_that_changes_nothing_is_said_with_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, devices: int, strategy: dict[str, Any], said: bool
) -> None:
    federation(tmp_path, devices, strategy=strategy)
    assert ("so this changes nothing: raise strategy.quorum above 0.05, or leave strategy.reach out" in caplog.text) is said
