from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.adapters.state import HEAD, AdapterKey, AdapterState, scaled
from sfl.errors import AdapterError, SettingsError
from sfl.fed_server.aggregation import Aggregation
from sfl.fed_server.merges import MERGES, make_merge
from sfl.fed_server.robust import Combining, make_robust
from sfl.federation_settings import COMBINING, LINEAR, NOT_ADDITIVE, RobustSettings
from sfl.settings import FedSettings
from tests.fed_server import updates as made
from tests.fed_server.made import adapter, same, update


def aggregation(**changes: Any) -> Aggregation:
    return Aggregation(FedSettings.model_validate({"devices": 7, **changes}))


@settings(max_examples=40, deadline=None)
@given(examples=st.lists(st.integers(1, 1000), min_size=1, max_size=6), order=st.randoms())
def test_with_nothing_switched_on_it_is_the_plain_weighted_sum_to_the_bit(examples: list[int], order: Any) -> None:
    updates = [update(f"d{i}", seed=i + 1, examples=count) for i, count in enumerate(examples)]
    population = sum(examples) + 17
    expected = {}
    for key, value in adapter(0).items():
        summed = value.copy()
        for i, count in enumerate(examples):
            summed = summed + np.float32(count / population) * adapter(i + 1)[key]
        expected[key] = summed
    order.shuffle(updates)
    done = aggregation().aggregate(adapter(0), updates, population)
    assert same(done.state, expected)
    assert done.weights == {f"d{i}": count / population for i, count in enumerate(examples)}
    assert not done.rejected and not done.notes


def test_one_update_counts_whole_and_the_newest_is_not_changed_in_place() -> None:
    state = adapter(0)
    done = aggregation(strategy={"name": "fedavg"}).aggregate(state, [update("a", 1)], 1)
    assert all(np.array_equal(done.state[key], value + adapter(1)[key]) for key, value in adapter(0).items())
    assert same(state, adapter(0))


def test_a_changed_update_reads_no_more_than_it_is_asked_for() -> None:
    asked: list[Any] = []
    plain = update("a", 1)

    def read(keys: Any) -> AdapterState:
        asked.append(keys)
        return plain.read(keys)

    key, *others = sorted(adapter(1))
    double = dataclasses.replace(plain, read=read).scaled(2.0)
    assert same(double.delta([key]), {key: 2 * adapter(1)[key]}) and asked == [[key]]
    assert same(double.delta(), scaled(adapter(1), 2.0)) and double.norm() == pytest.approx(2 * plain.norm())
    held = double.holding({key: adapter(2)[key]})
    assert same(held.delta(), {key: adapter(2)[key]}) and held.delta(others) == {} and asked == [[key], None, None]


def is_weighted_sum(name: str) -> bool:
    merge, weights = make_merge(name), {"device-0": 0.5, "device-1": 0.2}
    newest = merge.view(made.state(1), made.RANK, "version 10")
    updates = made.pool(merge, newest, [made.RANK, made.RANK])
    merged, expected = merge.merge(newest, updates, weights), dict(newest)
    for one in updates:
        expected |= {key: expected[key] + weights[one.device] * value for key, value in one.delta().items()}
    return merged.keys() == expected.keys() and all(np.allclose(merged[key], expected[key], atol=1e-5) for key in merged)


def test_the_settings_know_what_kind_of_merge_and_rule_each_is() -> None:
    """They cannot import the federation server, so they have lists of their own."""
    assert {name for name, merge in MERGES.items() if not merge.additive} == set(NOT_ADDITIVE)
    assert {name for name in MERGES if is_weighted_sum(name)} == set(LINEAR)
    rules = RobustSettings.model_fields["rule"].annotation.__args__  # type: ignore[union-attr]
    found = {rule for rule in rules if isinstance(make_robust(RobustSettings(rule=rule)), Combining)}
    assert found == set(COMBINING)


def test_a_merge_says_what_devices_do_not_train_and_that_is_not_in_updates() -> None:
    ffa = aggregation(merge="ffa")
    assert list(ffa.policy().frozen_parts) == ["A"] and not ffa.policy().fresh_optimizer
    assert not [key for key in ffa.trained(adapter(0), 2) if key.part == "A"]
    assert aggregation(merge="flora").policy().fresh_optimizer
    assert not aggregation().policy().frozen_parts


def test_trained_parts_have_the_shapes_of_their_rank() -> None:
    state = adapter(0) | {
        AdapterKey(0, "q", "frozen_A"): np.ones((4, 3), "f4"),
        AdapterKey(0, "q", "frozen_B"): np.ones((5, 4), "f4"),
    }
    trained = aggregation().trained(state, 1)
    assert trained.keys() == adapter(0).keys()
    assert trained[AdapterKey(0, "q", "A")].shape == (1, 3) and trained[AdapterKey(0, "q", "B")].shape == (5, 1)
    assert trained[AdapterKey(HEAD, "score", "weight")].shape == (2, 5)


@pytest.mark.parametrize(
    "changes",
    [{}, {"merge": "flora"}, {"merge": "hetlora"}, {"robust": {"rule": "median"}}, {"robust": {"rule": "multi-krum"}},
     {"robust": {"rule": "norm-clip"}}, {"privacy": {"clip": 0.5}}, {"strategy": {"name": "splitlora"}}],
    ids=str,
)  # fmt: skip
def test_one_update_that_cannot_be_used_takes_no_other_with_it(changes: dict[str, Any]) -> None:
    def unreadable(keys: object) -> AdapterState:
        raise AdapterError("the file is damaged")

    one = aggregation(**changes)
    others = [update(name, seed, rank=2, base=lambda: one.view(adapter(0), 0, 2)) for seed, name in enumerate("abcdef", start=1)]
    bad = [update("bad", read=unreadable), update("worse", read=unreadable)]
    done, without = one.aggregate(adapter(0), [*bad, *others], 8), one.aggregate(adapter(0), others, 8)
    assert same(done.state, without.state) and done.weights == without.weights
    assert done.rejected == without.rejected | {"bad": "the file is damaged", "worse": "the file is damaged"}


# Robust rules


def pool(attack: AdapterState, honest: int = 5) -> list[Any]:
    """Honest devices that agree but for a little, and two attackers."""
    close = [{key: value + np.float32(0.01 * i) for key, value in adapter(1).items()} for i in range(honest)]
    return [update(f"d{i}", state=state) for i, state in enumerate(close)] + [update(f"x{i}", state=attack) for i in range(2)]


@pytest.mark.parametrize("rule", ["krum", "multi-krum", "median", "trimmed-mean", "norm-clip"])
def test_under_a_robust_rule_attackers_do_not_have_their_way(rule: str) -> None:
    updates = pool(scaled(adapter(1), -100))
    robust = {"rule": rule, "attackers": 2}
    done = aggregation(robust=robust, strategy={"name": "fedavg"}).aggregate(adapter(0), updates, 7)
    plain = aggregation(strategy={"name": "fedavg"}).aggregate(adapter(0), updates, 7)
    wanted = {key: value + adapter(1)[key] for key, value in adapter(0).items()}

    def away(state: AdapterState) -> float:
        return float(sum(np.sum((value - wanted[key]) ** 2) for key, value in state.items())) ** 0.5

    assert away(done.state) < 0.1 * away(plain.state)
    assert done.weights.keys() <= {one.device for one in updates}
    assert sum(done.weights.values()) == pytest.approx(1), "what is selected carries the weight of all"
    if rule in ("krum", "multi-krum"):
        assert {"x0", "x1"} <= done.rejected.keys() and not done.rejected.keys() & done.weights.keys()
    if rule == "norm-clip":
        assert {"x0", "x1"} <= done.notes["made_smaller"].keys()


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_rule_that_makes_one_of_all_keeps_their_weight(rule: str) -> None:
    updates = [update(f"d{i}", seed=1, examples=1) for i in range(5)]
    done = aggregation(robust={"rule": rule, "attackers": 1}).aggregate(adapter(0), updates, 10)
    for key, value in done.state.items():
        np.testing.assert_allclose(value, adapter(0)[key] + 0.5 * adapter(1)[key], rtol=1e-5, atol=1e-6)
    assert done.weights == {f"d{i}": 0.1 for i in range(5)}


def test_too_few_updates_for_the_rule_are_refused_each_by_name() -> None:
    done = aggregation(robust={"rule": "krum", "attackers": 2}).aggregate(adapter(0), [update("a", 1), update("b", 2)], 2)
    assert same(done.state, adapter(0)) and done.weights == {}
    assert (
        done.rejected.keys() == {"a", "b"}
        and "krum needs 7 updates to bear 2 attackers, and the pool has 2" in done.rejected["a"]
    )


def test_more_attackers_than_the_expected_devices_allow_is_said_at_the_start() -> None:
    with pytest.raises(SettingsError, match=r"robust.rule bulyan with robust.attackers 2 needs the updates of 11 devices.*is 7"):
        aggregation(robust={"rule": "bulyan", "attackers": 2})


def test_what_would_not_be_finite_is_an_error() -> None:
    with pytest.raises(AdapterError, match="not finite: some update is far too large"), np.errstate(all="ignore"):
        aggregation().aggregate(adapter(0), [update("a", state=scaled(adapter(1), 3e38)), update("b", 2)], 2)


# Privacy


def test_clipping_alone_needs_no_accountant_and_tells_no_epsilon() -> None:
    clipping = aggregation(privacy={"clip": 1.0})
    done = clipping.aggregate(adapter(0), [update("a", 1)], 1)
    moved = np.sqrt(sum(np.sum((value - adapter(0)[key]) ** 2) for key, value in done.state.items()))
    assert moved == pytest.approx(1, rel=1e-4) and done.notes["clipped"].keys() == {"a"}
    clipping.keep(done)
    assert clipping.epsilons() == {}


def test_under_privacy_updates_are_clipped_and_the_sum_gets_noise() -> None:
    pytest.importorskip("dp_accounting")
    private = aggregation(privacy={"clip": 1.0, "noise": 0.5, "seed": 3}, strategy={"name": "fedavg"})
    done = private.aggregate(adapter(0), [update("a", 1), update("b", 2)], 2)
    again = aggregation(privacy={"clip": 1.0, "seed": 3}, strategy={"name": "fedavg"})
    clean = again.aggregate(adapter(0), [update("a", 1), update("b", 2)], 2)
    assert done.notes["clipped"].keys() == {"a", "b"} and max(done.notes["clipped"].values()) < 1
    moved = np.sqrt(sum(np.sum((value - adapter(0)[key]) ** 2) for key, value in clean.state.items()))
    assert moved <= 1 + 1e-5
    noise = np.concatenate([(value - clean.state[key]).ravel() for key, value in done.state.items()])
    assert 0.15 < noise.std() < 0.35, "0.5 * 1 * the greatest weight of 1/2"
    assert private.epsilons() == {}, "nothing is spent before the version is published"
    private.keep(done)
    assert private.epsilons().keys() == {"a", "b"} and min(private.epsilons().values()) > 0


def test_a_device_whose_budget_is_spent_does_not_count_any_more() -> None:
    pytest.importorskip("dp_accounting")
    private = aggregation(privacy={"clip": 1.0, "noise": 1.0, "epsilon": 8.0, "seed": 3}, strategy={"name": "fedavg"})
    rounds = 0
    while not (done := private.aggregate(adapter(0), [update("a", 1)], 1)).rejected:
        private.keep(done)
        rounds += 1
        assert rounds < 100
    assert rounds >= 1 and private.epsilons()["a"] <= 8.0
    assert "privacy budget is spent" in done.rejected["a"] and same(done.state, adapter(0))
    both = private.aggregate(adapter(0), [update("a", 1), update("b", 2)], 2)
    assert both.weights == {"b": 1.0} and both.rejected.keys() == {"a"}
