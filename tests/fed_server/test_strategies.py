from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.adapters.state import HEAD, AdapterState
from sfl.fed_server.strategies import Moments, Standing, make_strategy
from sfl.federation_settings import StrategyName, StrategySettings
from tests.fed_server.made import LAYERS, adapter, same, update

NAMES: list[StrategyName] = [
    "gsfs",
    "gsfs-printed",
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "fedbuff",
    "splitlora",
]
CONFIGURED = [
    *(StrategySettings(name=name) for name in NAMES),
    StrategySettings(name="gsfs", weights="examples"),
    StrategySettings(name="gsfs", weights="equal"),
    StrategySettings(name="fedavg", staleness=1.0),
]
counts = st.tuples(st.integers(1, 10**9), st.integers(1, 10**6), st.integers(1, 50), st.integers(0, 30))


def standing(pooled: int | Mapping[str, int], present: int, missing: int = 0, waited_s: float = 0.0, lost: int = 0) -> Standing:
    """The first `pooled` of devices d0, d1, ... are in the pool, with one submission each; the last `lost` are unreachable."""
    names = [f"d{i}" for i in range(present)]
    there = dict.fromkeys(names[:pooled], 1) if isinstance(pooled, int) else pooled
    return Standing(there, dict.fromkeys(names, 10), missing, waited_s, frozenset(names[present - lost :]))


# Weights


@pytest.mark.parametrize("settings", CONFIGURED, ids=lambda settings: f"{settings.name}-{settings.weights}")
@given(figures=st.lists(counts, min_size=1, max_size=8))
def test_weights_are_shares_of_one(settings: StrategySettings, figures: list[tuple[int, int, int, int]]) -> None:
    updates = [
        update(f"d{i}", examples=examples, submissions=max(submissions, pooled), pooled=pooled, lag=lag)
        for i, (examples, submissions, pooled, lag) in enumerate(figures)
    ]
    weights = make_strategy(settings).weights(updates, sum(update.examples for update in updates))
    assert weights.keys() == {update.device for update in updates}
    assert all(math.isfinite(weight) and weight > 0 for weight in weights.values())
    fresh = settings.staleness == 0 or not any(lag for *_, lag in figures)
    per_submission = settings.weights == "equal"  # a device that submitted twice has one update that weighs once
    if fresh and not per_submission:
        assert math.isclose(sum(weights.values()), 1.0)
    else:
        assert sum(weights.values()) <= 1 + 1e-9


def test_each_rule_weighs_by_what_it_names() -> None:
    updates = [update("a", examples=30, submissions=1), update("b", examples=10, submissions=4, pooled=2)]
    expected = {
        StrategySettings(name="gsfs"): (0.3, 0.1),
        StrategySettings(name="gsfs", weights="examples"): (0.75, 0.25),
        StrategySettings(name="gsfs", weights="equal"): (1 / 3, 1 / 3),
        StrategySettings(name="gsfs-printed"): (0.2, 0.8),
        StrategySettings(name="gsfs-printed", weights="examples"): (0.75, 0.25),
        StrategySettings(name="fedavg"): (0.75, 0.25),
        StrategySettings(name="splitlora"): (0.75, 0.25),
        StrategySettings(name="fedbuff"): (1 / 3, 1 / 3),
    }
    for settings, (a, b) in expected.items():
        weights = make_strategy(settings).weights(updates, population=100)
        assert weights == pytest.approx({"a": a, "b": b})


def test_staleness_takes_weight_from_an_update_and_gives_it_to_nobody() -> None:
    updates = [update("a", lag=0), update("b", lag=3)]
    assert make_strategy(StrategySettings(name="fedbuff")).weights(updates, 2) == {"a": 0.5, "b": 0.25}
    assert make_strategy(StrategySettings(name="gsfs")).weights(updates, 2) == {"a": 0.5, "b": 0.5}
    assert make_strategy(StrategySettings(name="gsfs", staleness=1)).weights(updates, 2) == {"a": 0.5, "b": 0.125}


# When it is due


def test_by_default_each_upload_to_gsfs_makes_a_version_and_as_printed_more_than_half_of_the_devices() -> None:
    gsfs, printed = make_strategy(StrategySettings()), make_strategy(StrategySettings(name="gsfs-printed"))
    assert gsfs.due(standing(1, 20)) and not gsfs.due(standing(1, 21))
    assert printed.due(standing(12, 20)) and not printed.due(standing(11, 20))


@pytest.mark.parametrize(
    ("quorum", "present", "needed"), [(0.6, 5, 3), (0.6, 7, 5), (0.7, 10, 7), (1.0, 3, 3), (0.1, 3, 1), (0.6, 1, 1)]
)
def test_the_quorum_is_a_share_of_the_present_devices_rounded_up(quorum: float, present: int, needed: int) -> None:
    strategy = make_strategy(StrategySettings(quorum=quorum))
    assert strategy.due(standing(needed, present))
    assert needed == 1 or not strategy.due(standing(needed - 1, present, waited_s=1e9))
    pooled = {f"d{i}": 1 for i in range(needed)}
    assert strategy.due(standing(pooled, 1, missing=present - 1)), "who has yet to join counts as present"
    assert needed == 1 or not strategy.due(standing(dict(list(pooled.items())[1:]), 1, missing=present - 1))


def test_the_quorum_leaves_out_who_cannot_be_reached_unless_it_is_in_the_pool() -> None:
    strategy = make_strategy(StrategySettings(quorum=0.6))
    assert not strategy.due(standing(2, 5))
    assert strategy.due(standing(2, 5, lost=2)), "two of the three that can be reached"
    assert not strategy.due(standing({"d4": 1}, 5, lost=2)), "d4 is unreachable and in the pool: one of four"
    assert strategy.due(standing({"d4": 1}, 1, lost=1))


def test_a_quorum_of_examples_waits_for_those_that_have_them() -> None:
    strategy = make_strategy(StrategySettings(quorum=0.6, quorum_of="examples"))
    present = {"big": 70, "a": 10, "b": 10, "c": 10}
    assert not strategy.due(Standing({"a": 1, "b": 1, "c": 1}, present))
    assert strategy.due(Standing({"big": 1}, present))
    assert not strategy.due(Standing({"big": 1}, present, missing=2)), "who has yet to join counts as one does on average"
    assert strategy.due(Standing({"left": 1}, {"a": 10}))


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedadam", "splitlora"])
def test_rounds_wait_for_all_who_are_present_but_not_for_ever(name: StrategyName) -> None:
    strategy = make_strategy(StrategySettings(name=name, round_timeout_s=60))
    assert not strategy.due(standing(1, 2, waited_s=59))
    assert strategy.due(standing(1, 2, waited_s=60))
    assert not strategy.due(standing(1, 1, missing=1, waited_s=59)), "who has yet to join is waited for"
    assert strategy.due(standing({"d0": 1, "left": 1}, 1)), "a device that has left or died must not be waited for"


def test_fedbuff_counts_submissions_whoever_they_come_from() -> None:
    strategy = make_strategy(StrategySettings(name="fedbuff", buffer=3))
    assert not strategy.due(standing({"d0": 1, "d1": 1}, 5, waited_s=1e9))
    assert strategy.due(standing({"d0": 3}, 5)) and strategy.due(standing(3, 5))


# Policies


def test_policies_carry_the_settings_and_each_strategys_defaults() -> None:
    gsfs = make_strategy(StrategySettings(beta=4.0)).policy()
    assert gsfs.keep_progress and gsfs.final_upload and gsfs.WhichOneof("rule") == "triggered"
    assert (gsfs.triggered.beta, gsfs.triggered.threshold) == (4.0, pytest.approx(0.1))
    assert (gsfs.triggered.min_steps, gsfs.triggered.max_steps) == (8, 16)
    assert not gsfs.triggered.HasField("network") and not gsfs.HasField("feedback")
    printed = make_strategy(StrategySettings(name="gsfs-printed"))
    policy = printed.policy()
    assert not policy.keep_progress and not policy.final_upload and not printed.final and not policy.triggered.max_steps
    assert (policy.triggered.min_steps, policy.triggered.threshold_growth, policy.triggered.threshold_decay) == (1, 1.0, 1.0)
    rounds = make_strategy(StrategySettings(name="fedavg", local_steps=7)).policy()
    assert rounds.WhichOneof("rule") == "periodic" and rounds.periodic.local_steps == 7 and not rounds.proximal
    assert make_strategy(StrategySettings(name="fedprox")).policy().proximal == 0.01
    assert make_strategy(StrategySettings(name="gsfs", proximal=0.5)).policy().proximal == 0.5
    shared = [name for name in NAMES if make_strategy(StrategySettings(name=name)).policy().shared_edge_adapter]
    assert shared == ["splitlora"]


def test_a_device_with_much_data_uploads_sooner_and_one_with_little_later() -> None:
    def bounds(size: float, **changes: Any) -> tuple[int, int]:
        settings = StrategySettings(**{"min_steps": 12, "max_steps": 24, "pace": 2 / 3, **changes})
        triggered = make_strategy(settings).policy(size).triggered
        return triggered.min_steps, triggered.max_steps

    assert [bounds(size) for size in (8.0, 1.0, 1 / 8)] == [(3, 6), (12, 24), (48, 96)]
    assert bounds(1e-9) == (96, 192) and bounds(1e15) == (2, 3), "what a device claims is believed within bounds"
    assert bounds(8.0, weights="equal") == (12, 24), "nothing follows from data that do not count"
    assert bounds(1 / 8, max_steps=0) == (48, 0)
    assert [bounds(size, max_steps=None) for size in (8.0, 1 / 8)] == [(3, 6), (48, 96)], "left out, it follows min_steps"
    assert [bounds(size, pace=0.0) for size in (8.0, 1 / 8)] == [(12, 24), (12, 24)]
    assert make_strategy(StrategySettings(name="gsfs-printed")).policy(1 / 8).triggered.min_steps == 1


def test_what_senses_the_network_and_the_feedback_are_switched_on_one_by_one() -> None:
    policy = make_strategy(StrategySettings(network=True, network_budget=0.2, max_steps=40)).policy()
    network = policy.triggered.network
    assert (network.budget, network.lowest, network.highest, policy.triggered.max_steps) == (0.2, 0.5, 4.0, 40)
    assert not policy.HasField("feedback")
    feedback = make_strategy(StrategySettings(feedback=True, feedback_patience=5)).policy().feedback
    assert (feedback.decrease, feedback.increase, feedback.lowest, feedback.patience) == (0.5, 1.1, 0.1, 5)
    assert feedback.margin == 0.02


def test_under_fedbuff_devices_upload_every_local_steps_and_never_wait() -> None:
    policy = make_strategy(StrategySettings(name="fedbuff", local_steps=4)).policy()
    assert (policy.triggered.min_steps, policy.triggered.max_steps, policy.triggered.validate_every) == (4, 4, 0)
    assert not policy.keep_progress


# Server optimisers


def progress(seed: int) -> AdapterState:
    return adapter(seed, 0.1)


def moved(state: AdapterState, by: AdapterState) -> AdapterState:
    return {key: value + by[key] for key, value in state.items()}


@pytest.mark.parametrize("name", ["fedavg", "gsfs", "fedbuff"])
def test_without_a_server_optimiser_the_version_is_what_was_merged(name: StrategyName) -> None:
    merged = moved(adapter(0), progress(1))
    state, moments = make_strategy(StrategySettings(name=name)).apply(adapter(0), merged, {})
    assert same(state, merged) and moments == {}


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_server_optimisers_do_what_their_papers_say(name: StrategyName) -> None:
    """Three versions against the equations in float64, written out for single values."""
    settings = StrategySettings(name=name, server_rate=0.3, server_momentum=0.8, server_second_momentum=0.95, server_tau=0.01)
    strategy, state, moments = make_strategy(settings), adapter(0), Moments()
    expected = {key: value.astype("f8") for key, value in state.items()}
    first = {key: np.zeros(value.shape) for key, value in state.items()}
    second = {key: np.full(value.shape, 0.01**2) for key, value in state.items()}
    for version in (1, 2, 3):
        g = progress(version)
        state, moments = strategy.apply(state, moved(state, g), moments)
        for key, value in g.items():
            delta = value.astype("f8")
            if name == "fedavgm":
                first[key] = 0.8 * first[key] + delta
                expected[key] = expected[key] + 0.3 * first[key]
                continue
            first[key] = 0.8 * first[key] + 0.2 * delta
            if name == "fedadam":
                second[key] = 0.95 * second[key] + 0.05 * delta**2
            elif name == "fedyogi":
                second[key] = second[key] - 0.05 * delta**2 * np.sign(second[key] - delta**2)
            else:
                second[key] = second[key] + delta**2
            expected[key] = expected[key] + 0.3 * first[key] / (np.sqrt(second[key]) + 0.01)
    for key, value in state.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam", "fedyogi", "fedadagrad"])
def test_a_server_optimiser_goes_where_the_updates_go_and_changes_nothing_in_place(name: StrategyName) -> None:
    before, merged = adapter(0), moved(adapter(0), progress(1))
    strategy = make_strategy(StrategySettings(name=name))
    _, moments = strategy.apply(before, merged, {})
    kept = {moment: {key: value.copy() for key, value in state.items()} for moment, state in moments.items()}
    after, _ = strategy.apply(before, merged, moments)
    for key, value in after.items():
        assert (np.sign(value - before[key]) == np.sign(merged[key] - before[key])).all(), "the step is added"
    assert same(before, adapter(0)) and same(merged, moved(adapter(0), progress(1)))
    assert all(same(moments[moment], kept[moment]) for moment in kept)


def test_fedavgm_follows_a_steady_progress_at_its_own_pace() -> None:
    strategy, state, moments = make_strategy(StrategySettings(name="fedavgm")), adapter(0), Moments()
    steady = progress(1)
    for _ in range(100):
        last = state
        state, moments = strategy.apply(state, moved(state, steady), moments)
    for key, value in steady.items():
        np.testing.assert_allclose(state[key] - last[key], value, rtol=0.02, atol=1e-4)


# SplitLoRA


def summed(updates: list, weights: dict[str, float]) -> AdapterState:
    result = {key: np.zeros_like(value) for key, value in adapter(0).items()}
    for one in updates:
        for key, value in one.delta().items():
            result[key] += weights[one.device] * value
    return result


@given(cuts=st.lists(st.integers(1, LAYERS), min_size=1, max_size=5), data=st.data())
def test_splitlora_weighs_each_copy_of_a_layer_by_the_examples_behind_it(cuts: list[int], data: st.DataObject) -> None:
    examples = data.draw(st.lists(st.integers(1, 100), min_size=len(cuts), max_size=len(cuts)))
    updates = [update(f"d{i}", seed=i + 1, examples=examples[i], cut=cut) for i, cut in enumerate(cuts)]
    strategy = make_strategy(StrategySettings(name="splitlora"))
    weights = strategy.weights(updates, sum(examples))
    result = summed(strategy.prepare(updates, weights), weights)
    for key, value in result.items():
        own = [one for one in updates if one.cut > key.layer]
        at_edge = [one for one in updates if one.cut <= key.layer]
        copies = [(one.examples, one.delta()[key].astype("f8")) for one in own]
        if at_edge:
            copies.append((sum(one.examples for one in at_edge), sum(one.delta()[key].astype("f8") for one in at_edge)))
        expected = sum(count * progress for count, progress in copies) / sum(examples)
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-5)


def test_under_one_cut_splitlora_adds_the_edges_pieces_up() -> None:
    updates = [update("a", 1, examples=30), update("b", 2, examples=10)]
    strategy = make_strategy(StrategySettings(name="splitlora"))
    weights = strategy.weights(updates, 40)
    prepared = strategy.prepare(updates, weights)
    result = summed(prepared, weights)
    a, b = adapter(1), adapter(2)
    for key, value in result.items():
        expected = 0.75 * a[key] + 0.25 * b[key] if key.layer < 1 else a[key] + b[key]
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
    head = next(key for key in a if key.layer == HEAD)
    assert prepared[0].delta([head]).keys() == {head}, "a part of it can be read by itself"


def test_where_progress_cannot_be_kept_devices_adopt_after_an_upload_alone() -> None:
    kept, lost, printed = (
        make_strategy(StrategySettings(name=name, keep_progress=keep)).policy().adopt_after_upload
        for name, keep in (("gsfs", True), ("gsfs", False), ("gsfs-printed", False))
    )
    assert (kept, lost, printed) == (False, True, False)
