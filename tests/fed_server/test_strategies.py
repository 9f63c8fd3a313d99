from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.errors import AdapterError
from sfl.fed_server.strategies import Update, make_strategy, weighted_sum
from sfl.settings import StrategySettings
from tests.fed_server.made import adapter, same

CONFIGURED = [
    StrategySettings(name="gsfs"),
    StrategySettings(name="gsfs-printed"),
    StrategySettings(name="gsfs", weights="examples"),
    StrategySettings(name="fedavg"),
]
counts = st.tuples(st.integers(1, 10**9), st.integers(1, 10**6))


def update(device: str, seed: int = 0, examples: int = 1, submissions: int = 1) -> Update:
    return Update(device, adapter(seed), version=0, examples=examples, submissions=submissions)


@pytest.mark.parametrize("settings", CONFIGURED, ids=lambda settings: f"{settings.name}-{settings.weights}")
@given(figures=st.lists(counts, min_size=1, max_size=8))
def test_weights_are_shares_of_one(settings: StrategySettings, figures: list[tuple[int, int]]) -> None:
    updates = [Update(f"d{i}", {}, 0, examples, submissions) for i, (examples, submissions) in enumerate(figures)]
    weights = make_strategy(settings).weights(updates, sum(update.examples for update in updates))
    assert weights.keys() == {update.device for update in updates}
    assert all(math.isfinite(weight) and weight >= 0 for weight in weights.values())
    assert math.isclose(sum(weights.values()), 1.0)


def test_each_rule_weighs_by_what_it_names() -> None:
    updates = [update("a", examples=30, submissions=1), update("b", examples=10, submissions=4)]
    expected = {
        StrategySettings(name="gsfs"): (0.3, 0.1),
        StrategySettings(name="gsfs", weights="examples"): (0.75, 0.25),
        StrategySettings(name="gsfs-printed"): (0.2, 0.8),
        StrategySettings(name="gsfs-printed", weights="examples"): (0.75, 0.25),
        StrategySettings(name="fedavg"): (0.75, 0.25),
    }
    for settings, (a, b) in expected.items():
        weights = make_strategy(settings).weights(updates, population=100)
        assert weights == pytest.approx({"a": a, "b": b})


@given(st.permutations(range(5)))
def test_the_order_of_updates_does_not_matter_to_the_bit(order: list[int]) -> None:
    updates = [update(f"d{i}", seed=i + 1, examples=i + 3) for i in range(5)]
    strategy = make_strategy(StrategySettings())
    expected, _ = strategy.aggregate(adapter(0), updates, 100)
    result, _ = strategy.aggregate(adapter(0), [updates[i] for i in order], 100)
    assert same(result, expected)


def test_the_sum_is_equation_14_and_one_update_counts_whole() -> None:
    state, one, two = adapter(0), update("a", 1), update("b", 2)
    result = weighted_sum(state, [one, two], {"a": 0.25, "b": 0.75})
    for key in state:
        np.testing.assert_allclose(result[key], state[key] + 0.25 * one.delta[key] + 0.75 * two.delta[key], rtol=1e-5, atol=1e-6)
        assert result[key].dtype == np.float32
    alone = weighted_sum(state, [one], {"a": 1.0})
    assert all(np.array_equal(alone[key], state[key] + one.delta[key]) for key in state)
    assert same(state, adapter(0)), "the global adapter must not be changed in place"


@pytest.mark.parametrize("weight", [1.5, math.nan, math.inf, -1.0])
def test_weights_that_are_no_shares_are_refused(weight: float) -> None:
    with pytest.raises(AdapterError, match="not shares of one"):
        weighted_sum(adapter(0), [update("a", 1)], {"a": weight})


@pytest.mark.parametrize(
    ("quorum", "present", "needed"), [(0.6, 5, 3), (0.6, 7, 5), (0.7, 10, 7), (1.0, 3, 3), (0.1, 3, 1), (0.6, 1, 1)]
)
def test_the_quorum_is_a_share_of_the_present_devices_rounded_up(quorum: float, present: int, needed: int) -> None:
    strategy = make_strategy(StrategySettings(quorum=quorum))
    names = [f"d{i}" for i in range(present)]
    assert strategy.due(set(names[:needed]), set(names), 0, 0.0)
    assert needed == 1 or not strategy.due(set(names[: needed - 1]), set(names), 0, 1e9)
    assert strategy.due(set(names[:needed]), set(names[:1]), present - 1, 0.0), "who has yet to join counts as present"
    assert needed == 1 or not strategy.due(set(names[: needed - 1]), set(names[:1]), present - 1, 1e9)


def test_fedavg_waits_for_all_who_are_present_but_not_for_ever() -> None:
    strategy = make_strategy(StrategySettings(name="fedavg", round_timeout_s=60))
    assert not strategy.due({"a"}, {"a", "b"}, 0, 59.0)
    assert strategy.due({"a"}, {"a", "b"}, 0, 60.0)
    assert not strategy.due({"a"}, {"a"}, 1, 59.0), "who has yet to join is waited for"
    assert strategy.due({"a", "b"}, {"b"}, 0, 0.0), "a device that has left or died must not be waited for"


def test_policies_carry_the_settings_and_each_strategys_defaults() -> None:
    gsfs = make_strategy(StrategySettings(beta=4.0)).policy()
    assert gsfs.keep_progress and gsfs.final_upload and gsfs.WhichOneof("rule") == "triggered"
    assert (gsfs.triggered.beta, gsfs.triggered.min_steps, gsfs.triggered.threshold) == (4.0, 10, 0.1)
    printed = make_strategy(StrategySettings(name="gsfs-printed"))
    policy = printed.policy()
    assert not policy.keep_progress and not policy.final_upload and not printed.final
    assert (policy.triggered.min_steps, policy.triggered.threshold_growth, policy.triggered.threshold_decay) == (1, 1.0, 1.0)
    rounds = make_strategy(StrategySettings(name="fedavg", local_steps=7)).policy()
    assert rounds.WhichOneof("rule") == "periodic" and rounds.periodic.local_steps == 7
