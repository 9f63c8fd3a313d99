"""Each merge against the dense mean of the products, for random ranks, weights and lags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState
from sfl.errors import AdapterError, SettingsError
from sfl.fed_server.merges import MERGES, make_merge
from tests.fed_server.made import same
from tests.fed_server.updates import (
    PLACES,
    RANK,
    SHAPES,
    WEIGHT,
    ended,
    padded,
    pool,
    progress,
    state,
    trained_product,
    update,
    whole_product,
)

EXACT = ("ffa", "fedex", "flora")  # the mean of the products, whatever ranks and lags
FLEX = ("flexlora", "flexlora-printed")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}

ranks = st.lists(st.integers(1, RANK), min_size=1, max_size=5)
seeds = st.integers(0, 10**6)
few = settings(max_examples=20, deadline=None)


def weights_of(count: int, seed: int, whole: float = 1.0) -> dict[str, float]:
    """Random weights with that sum."""
    values = np.random.default_rng(seed).uniform(0.1, 1, count)
    return {f"device-{number}": float(whole * value / values.sum()) for number, value in enumerate(values)}


def lags_of(count: int, seed: int) -> list[int]:
    return [int(lag) for lag in np.random.default_rng(seed).integers(0, 3, count)]


def best(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The best approximation of that rank, of the whole matrix."""
    u, s, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


# What all have in common


@pytest.mark.parametrize("name", MERGES)
@given(order=st.permutations(range(4)), seed=seeds)
@few
def test_the_order_of_updates_does_not_matter_to_the_bit(name: str, order: list[int], seed: int) -> None:
    merge, newest = make_merge(name), state(seed, frozen=2)
    updates, weights = pool(merge, newest, [4, 2, 4, 3], [0, 0, 1, 2], seed), weights_of(4, seed, 0.8)
    assert same(merge.merge(newest, updates, weights), merge.merge(newest, [updates[i] for i in order], weights))


@pytest.mark.parametrize("name", MERGES)
@given(seed=seeds)
@few
def test_one_device_alone_makes_the_version_what_it_has_learnt(name: str, seed: int) -> None:
    merge, newest = make_merge(name), state(seed, frozen=2)
    (only,) = pool(merge, newest, [RANK], seed=seed)
    result, mine = merge.merge(newest, [only], {only.device: 1.0}), ended(only)
    for place in PLACES:
        expected = whole_product(newest, place) + progress(only, place)
        np.testing.assert_allclose(whole_product(result, place), expected, **CLOSE)
        np.testing.assert_allclose(whole_product(result, place), whole_product(mine, place), **CLOSE)
    np.testing.assert_allclose(result[WEIGHT], mine[WEIGHT], **CLOSE)


@pytest.mark.parametrize("name", MERGES)
@given(seed=seeds, share=st.floats(0.1, 0.9))
@few
def test_a_device_in_two_with_its_weight_divided_is_the_same_device(name: str, seed: int, share: float) -> None:
    merge, newest = make_merge(name), state(seed)
    one, other = pool(merge, newest, [3, RANK], seed=seed)
    twin = update("twin", one.delta(), one.base, one.rank)
    once = merge.merge(newest, [one, other], {one.device: 0.6, other.device: 0.4})
    twice = merge.merge(newest, [one, twin, other], {one.device: 0.6 * share, "twin": 0.6 * (1 - share), other.device: 0.4})
    for place in PLACES:
        np.testing.assert_allclose(whole_product(twice, place), whole_product(once, place), **CLOSE)
    np.testing.assert_allclose(twice[WEIGHT], once[WEIGHT], **CLOSE)


@pytest.mark.parametrize("name", [name for name in MERGES if name != "flexlora-printed"])
def test_updates_of_nothing_change_nothing(name: str) -> None:
    merge, newest = make_merge(name), state(1, frozen=2)
    updates = pool(merge, newest, [2, RANK], scale=0.0)
    result = merge.merge(newest, updates, {"device-0": 0.5, "device-1": 0.5})
    for place in PLACES:
        np.testing.assert_allclose(whole_product(result, place), whole_product(newest, place), **CLOSE)
    assert np.array_equal(result[WEIGHT], newest[WEIGHT])


@pytest.mark.parametrize("name", MERGES)
def test_weights_of_less_than_one_change_less(name: str) -> None:
    """With s = sum w_k at the newest version and rank, (1 - s) W + sum w_k W_k, where the merge is exact."""
    merge, newest = make_merge(name), state(2)
    updates, weights = pool(merge, newest, [RANK] * 3, scale=0.1), weights_of(3, 5, 0.3)
    result = merge.merge(newest, updates, weights)
    np.testing.assert_allclose(
        result[WEIGHT], 0.7 * newest[WEIGHT] + sum(weights[one.device] * ended(one)[WEIGHT] for one in updates), **CLOSE
    )
    if name in EXACT:
        for place in PLACES:
            devices = sum(weights[one.device] * whole_product(ended(one), place) for one in updates)
            np.testing.assert_allclose(whole_product(result, place), 0.7 * whole_product(newest, place) + devices, **CLOSE)


@pytest.mark.parametrize("name", MERGES)
def test_the_newest_version_and_the_updates_stay_as_they_are(name: str) -> None:
    merge, newest = make_merge(name), state(3, frozen=2)
    updates = pool(merge, newest, [2, RANK], [0, 1])
    before, bases = state(3, frozen=2), [{k: v.copy() for k, v in one.base().items()} for one in updates]
    result = merge.merge(newest, updates, {"device-0": 0.5, "device-1": 0.5})
    view = merge.view(newest, 2, "x")
    assert same(newest, before) and all(same(one.base(), base) for one, base in zip(updates, bases))
    assert all(value.dtype == np.float32 and value.flags.c_contiguous for value in (*result.values(), *view.values()))


@pytest.mark.parametrize("name", MERGES)
def test_the_same_tensors_of_the_same_shapes_come_out_whatever_the_ranks(name: str) -> None:
    merge, newest = make_merge(name), state(4)
    result = merge.merge(newest, pool(merge, newest, [1, 2]), {"device-0": 0.5, "device-1": 0.5})
    for key, value in newest.items():
        assert result[key].shape == value.shape
    assert {key.part for key in result.keys() - newest.keys()} <= {FROZEN_A, FROZEN_B}


@pytest.mark.parametrize("name", MERGES)
@pytest.mark.parametrize("wrong", [1.5, math.nan, math.inf, -0.1])
def test_weights_that_are_no_shares_are_refused(name: str, wrong: float) -> None:
    merge, newest = make_merge(name), state(5)
    with pytest.raises(AdapterError, match="not shares of one"):
        merge.merge(newest, pool(merge, newest, [RANK]), {"device-0": wrong})


@pytest.mark.parametrize("name", MERGES)
def test_an_update_that_lacks_a_tensor_or_has_another_shape_is_named(name: str) -> None:
    merge, newest = make_merge(name), state(6)
    (one,) = pool(merge, newest, [2])
    key = AdapterKey(1, "q", "B")
    lacking = one.changed(lambda delta: {k: v for k, v in delta.items() if k != key})
    with pytest.raises(AdapterError, match=r"1/q/B is missing in the update of device 'device-0', expected \(7, 2\)"):
        merge.merge(newest, [lacking], {"device-0": 1.0})
    larger = one.changed(lambda delta: {**delta, key: np.zeros((7, 3), np.float32)})
    with pytest.raises(AdapterError, match=r"1/q/B has shape \(7, 3\) in the update of device 'device-0'"):
        merge.merge(newest, [larger], {"device-0": 1.0})


@pytest.mark.parametrize("name", ["fedex", "flora", *FLEX, "hetlora"])
def test_merges_of_products_hold_one_modules_factors_at_a_time(name: str) -> None:
    merge, newest = make_merge(name), state(7)
    (one,) = pool(merge, newest, [RANK])
    asked: list[int] = []

    def read(keys: Collection[AdapterKey] | None) -> AdapterState:
        blocks = {key for key in (one.delta() if keys is None else keys) if key.layer != HEAD}
        asked.append(len(blocks))
        return one.delta(keys)

    merge.merge(newest, [dataclasses.replace(one, read=read)], {"device-0": 1.0})
    averaging = {"fedex": 1, "hetlora": 1}.get(name, 0)  # one pass over whole updates, which it adds up one by one
    assert sorted(asked, reverse=True)[averaging] == 2
    assert asked.count(2) == len(PLACES)


@pytest.mark.parametrize("rank", [0, RANK + 1])
@pytest.mark.parametrize("name", MERGES)
def test_there_is_no_view_of_a_rank_that_the_state_has_not(name: str, rank: int) -> None:
    with pytest.raises(AdapterError, match=f"no device can have rank {rank}: the federation's LoRA rank is 4"):
        make_merge(name).view(state(8), rank, "x")


def test_an_unknown_merge_is_refused_with_those_there_are() -> None:
    with pytest.raises(SettingsError, match=r"no merge 'svd': choose one of average, ffa"):
        make_merge("svd")


# Averages


@given(ranks=ranks, seed=seeds)
@few
def test_the_average_is_the_weighted_sum_of_padded_factors_to_the_bit(ranks: list[int], seed: int) -> None:
    merge, newest = make_merge("average"), state(seed, frozen=2)
    updates, weights = pool(merge, newest, ranks, seed=seed), weights_of(len(ranks), seed, 0.9)
    expected = {key: value.copy() for key, value in newest.items()}
    for one in updates:
        for key, value in padded(one.delta(), newest, one.rank).items():
            expected[key] = expected[key] + np.float32(weights[one.device]) * value
    assert same(merge.merge(newest, updates, weights), expected)


@given(seed=seeds)
@few
def test_the_average_misses_the_mean_of_the_products_by_the_covariance_of_the_factors(seed: int) -> None:
    merge, newest = make_merge("average"), state(seed)
    updates, weights = pool(merge, newest, [RANK] * 3, seed=seed), weights_of(3, seed)
    result = merge.merge(newest, updates, weights)
    for place in PLACES:
        a, b = AdapterKey(*place, "A"), AdapterKey(*place, "B")
        deltas = [(weights[one.device], one.delta()[b].astype(float), one.delta()[a].astype(float)) for one in updates]
        covariance = sum(w * db @ da for w, db, da in deltas)
        covariance = covariance - sum(w * db for w, db, _ in deltas) @ sum(w * da for w, _, da in deltas)
        exact = whole_product(newest, place) + sum(weights[one.device] * progress(one, place) for one in updates)
        np.testing.assert_allclose(exact - whole_product(result, place), covariance, **CLOSE)
        assert np.abs(covariance).max() > 0.01


def test_ffa_has_no_a_in_its_updates_and_leaves_it_as_it_is() -> None:
    merge, newest = make_merge("ffa"), state(9)
    updates = pool(merge, newest, [2, RANK])
    assert not any(key.part == "A" for one in updates for key in one.delta())
    result = merge.merge(newest, updates, {"device-0": 0.5, "device-1": 0.5})
    for key, value in newest.items():
        assert np.array_equal(result[key], value) == (key.part == "A")


@given(ranks=ranks, seed=seeds)
@few
def test_hetlora_weighs_by_the_norms_of_the_dense_products_and_the_head_by_the_weights_alone(ranks: list[int], seed: int) -> None:
    merge, newest = make_merge("hetlora"), state(seed)
    updates = pool(merge, newest, ranks, lags_of(len(ranks), seed), seed)
    weights = weights_of(len(ranks), seed, 0.7)
    sizes = {
        one.device: math.sqrt(sum(np.linalg.norm(trained_product(ended(one), place)) ** 2 for place in PLACES)) for one in updates
    }
    whole = sum(weights[device] * size for device, size in sizes.items())
    by_norm = {device: 0.7 * weights[device] * size / whole for device, size in sizes.items()}
    average = make_merge("average")
    result, expected = merge.merge(newest, updates, weights), average.merge(newest, updates, by_norm)
    for key, value in expected.items():
        if key.layer != HEAD:
            np.testing.assert_allclose(result[key], value, **CLOSE)
    assert np.array_equal(result[WEIGHT], average.merge(newest, updates, weights)[WEIGHT])


def test_hetlora_of_products_that_are_still_zero_keeps_the_weights() -> None:
    merge, newest = make_merge("hetlora"), state(10)
    for key in newest:
        if key.part == "B":
            newest[key][:] = 0
    one, other = pool(merge, newest, [RANK, RANK])
    unchanged = [
        each.changed(lambda delta: {k: v * (k.part != "B" and k.layer != HEAD) for k, v in delta.items()})
        for each in (one, other)
    ]
    weights = {"device-0": 0.25, "device-1": 0.5}
    assert same(merge.merge(newest, unchanged, weights), make_merge("average").merge(newest, unchanged, weights))


# Exact ones


@pytest.mark.parametrize("name", EXACT)
@given(ranks=ranks, seed=seeds, whole=st.floats(0.2, 1.0))
@few
def test_exact_merges_are_the_mean_of_the_products(name: str, ranks: list[int], seed: int, whole: float) -> None:
    merge, newest = make_merge(name), state(seed, frozen=2)
    lags = [0] * len(ranks) if name == "ffa" else lags_of(len(ranks), seed)  # FFA has one A for all versions
    updates, weights = pool(merge, newest, ranks, lags, seed), weights_of(len(ranks), seed, whole)
    result = merge.merge(newest, updates, weights)
    for place in PLACES:
        expected = whole_product(newest, place) + sum(weights[one.device] * progress(one, place) for one in updates)
        np.testing.assert_allclose(whole_product(result, place), expected, **CLOSE)


@given(ranks=ranks, seed=seeds)
@few
def test_fedex_trains_on_with_the_average(ranks: list[int], seed: int) -> None:
    merge, newest = make_merge("fedex"), state(seed)
    updates, weights = pool(merge, newest, ranks, lags_of(len(ranks), seed), seed), weights_of(len(ranks), seed)
    result, average = merge.merge(newest, updates, weights), make_merge("average").merge(newest, updates, weights)
    assert all(np.array_equal(result[key], average[key]) for key in average)


def test_fedex_of_one_device_has_nothing_to_freeze() -> None:
    merge, newest = make_merge("fedex"), state(11)
    assert merge.merge(newest, pool(merge, newest, [RANK]), {"device-0": 1.0}).keys() == newest.keys()


@pytest.mark.parametrize("name", ["fedex", "flora"])
def test_frozen_factors_stay_within_full_rank_and_exact_over_many_versions(name: str) -> None:
    merge, newest = make_merge(name), state(12)
    exact = {place: whole_product(newest, place) for place in PLACES}
    for version in range(12):
        updates, weights = pool(merge, newest, [RANK, 2, 3], seed=10 * version, scale=0.3), weights_of(3, version)
        for place in PLACES:
            exact[place] = exact[place] + sum(weights[one.device] * progress(one, place) for one in updates)
        newest = merge.merge(newest, updates, weights)
        for layer, module in PLACES:
            frozen = len(newest[AdapterKey(layer, module, FROZEN_A)])
            assert 0 < frozen <= min(SHAPES[module])
            assert newest[AdapterKey(layer, module, FROZEN_B)].shape == (SHAPES[module][0], frozen)
    for place in PLACES:
        np.testing.assert_allclose(whole_product(newest, place), exact[place], rtol=1e-3, atol=1e-4)


# FLoRA


def test_flora_gives_each_version_new_factors_and_every_rank_the_whole_product() -> None:
    merge, newest = make_merge("flora"), state(13, frozen=1)
    whole, small, again = merge.view(newest, RANK, "4"), merge.view(newest, 2, "4"), merge.view(newest, 2, "4")
    other = merge.view(newest, 2, "5")
    assert same(small, again)
    for layer, module in PLACES:
        a, b = AdapterKey(layer, module, "A"), AdapterKey(layer, module, "B")
        assert not small[b].any() and small[b].shape == (SHAPES[module][0], 2)
        assert np.array_equal(small[a], whole[a][:2])
        assert not np.isclose(small[a], other[a]).any()
        assert 0.5 < np.abs(whole[a]).max() * math.sqrt(SHAPES[module][1]) <= 1.0, "as wide as version 0 is drawn"
        for view in (whole, small):
            np.testing.assert_allclose(whole_product(view, (layer, module)), whole_product(newest, (layer, module)), **CLOSE)
    assert not np.isclose(whole[AdapterKey(0, "q", "A")], whole[AdapterKey(1, "q", "A")]).any()


def test_flora_stacks_the_devices_factors_with_the_weights_in_b() -> None:
    merge, newest = make_merge("flora"), merge_start(14)
    updates = pool(merge, newest, [1, 2])
    result = merge.merge(newest, updates, {"device-0": 0.25, "device-1": 0.75})
    for place in PLACES:
        devices = [ended(one) for one in updates]
        a, b = AdapterKey(*place, "A"), AdapterKey(*place, "B")
        expected_b = np.concatenate([0.25 * devices[0][b], 0.75 * devices[1][b]], axis=1)
        np.testing.assert_allclose(result[AdapterKey(*place, FROZEN_A)], np.concatenate([d[a] for d in devices]), rtol=1e-6)
        np.testing.assert_allclose(result[AdapterKey(*place, FROZEN_B)], expected_b, rtol=1e-6)
        assert not result[b].any() and np.array_equal(result[a], newest[a])


def merge_start(seed: int) -> AdapterState:
    """A version 0: B is zero."""
    return {key: np.zeros_like(value) if key.part == "B" else value for key, value in state(seed).items()}


# FlexLoRA


@pytest.mark.parametrize("name", FLEX)
@given(seed=seeds, whole=st.floats(0.2, 1.0))
@few
def test_flexlora_is_the_best_approximation_of_the_mean_of_the_products(name: str, seed: int, whole: float) -> None:
    merge, newest = make_merge(name), state(seed, frozen=2)
    updates, weights = pool(merge, newest, [RANK] * 3, seed=seed), weights_of(3, seed, whole)
    result = merge.merge(newest, updates, weights)
    for place in PLACES:
        devices = sum(weights[one.device] * trained_product(ended(one), place) for one in updates)
        mean = (1 - whole) * trained_product(newest, place) + devices
        np.testing.assert_allclose(trained_product(result, place), best(mean, RANK), rtol=1e-3, atol=1e-4)
        left = np.linalg.norm(trained_product(result, place) - mean)
        assert left == pytest.approx(np.linalg.norm(np.linalg.svd(mean)[1][RANK:]), rel=1e-3, abs=1e-4), "Eckart and Young"
        assert np.array_equal(result[AdapterKey(*place, FROZEN_A)], newest[AdapterKey(*place, FROZEN_A)])


@given(ranks=ranks, seed=seeds)
@few
def test_flexlora_of_mixed_ranks_and_versions_adds_up_what_devices_changed_of_their_views(ranks: list[int], seed: int) -> None:
    merge, newest = make_merge("flexlora"), state(seed)
    updates, weights = pool(merge, newest, ranks, lags_of(len(ranks), seed), seed), weights_of(len(ranks), seed)
    result = merge.merge(newest, updates, weights)
    for place in PLACES:
        mean = trained_product(newest, place) + sum(weights[one.device] * progress(one, place) for one in updates)
        np.testing.assert_allclose(trained_product(result, place), best(mean, RANK), rtol=1e-3, atol=1e-3)


@given(ranks=ranks, seed=seeds)
@few
def test_as_published_it_averages_products_whatever_their_ranks(ranks: list[int], seed: int) -> None:
    merge, newest = make_merge("flexlora-printed"), state(seed)
    updates, weights = pool(merge, newest, ranks, seed=seed), weights_of(len(ranks), seed)
    result = merge.merge(newest, updates, weights)
    for place in PLACES:
        mean = sum(weights[one.device] * trained_product(ended(one), place) for one in updates)
        np.testing.assert_allclose(trained_product(result, place), best(mean, RANK), rtol=1e-3, atol=1e-3)


def test_only_as_published_does_what_small_ranks_do_not_hold_shrink() -> None:
    newest = state(15)
    for name, share in (("flexlora", 1.0), ("flexlora-printed", 0.5)):
        merge = make_merge(name)
        updates = pool(merge, newest, [2, RANK], scale=0.0)
        result = merge.merge(newest, updates, {"device-0": 0.5, "device-1": 0.5})
        for place in PLACES:
            before, after = (np.linalg.svd(trained_product(each, place))[1] for each in (newest, result))
            np.testing.assert_allclose(after[:2], before[:2], rtol=1e-4)
            np.testing.assert_allclose(after[2:RANK], share * before[2:RANK], rtol=1e-4)


@pytest.mark.parametrize("rank", range(1, RANK + 1))
def test_a_flexlora_view_is_the_best_approximation_of_its_rank(rank: int) -> None:
    newest = state(16, frozen=2)
    view = make_merge("flexlora").view(newest, rank)
    for place in PLACES:
        assert view[AdapterKey(*place, "A")].shape[0] == view[AdapterKey(*place, "B")].shape[1] == rank
        np.testing.assert_allclose(trained_product(view, place), best(trained_product(newest, place), rank), **CLOSE)
        assert np.array_equal(view[AdapterKey(*place, FROZEN_B)], newest[AdapterKey(*place, FROZEN_B)])


def test_flexlora_turns_its_factors_towards_those_before() -> None:
    merge, newest = make_merge("flexlora"), state(17)
    balanced = merge.merge(newest, pool(merge, newest, [RANK], scale=0.0), {"device-0": 1.0})
    result = merge.merge(balanced, pool(merge, balanced, [RANK] * 3, scale=0.01), weights_of(3, 1))
    for key, value in balanced.items():
        assert np.abs(result[key] - value).max() < 0.1, "a small step must not turn the basis"
    for place in PLACES:
        a, b = result[AdapterKey(*place, "A")], result[AdapterKey(*place, "B")]
        np.testing.assert_allclose(a @ a.T, b.T @ b, rtol=1e-3, atol=1e-4, err_msg="both sides have the same part")


def test_flexlora_of_products_that_are_still_zero_stays_trainable() -> None:
    merge, newest = make_merge("flexlora"), merge_start(18)
    result = merge.merge(newest, pool(merge, newest, [RANK], scale=0.0), {"device-0": 1.0})
    view = merge.view(newest, 2)
    for place in PLACES:
        a, b = AdapterKey(*place, "A"), AdapterKey(*place, "B")
        assert not result[b].any() and not view[b].any()
        np.testing.assert_allclose(result[a], newest[a], **CLOSE)
        np.testing.assert_allclose(view[a], newest[a][:2], **CLOSE)
