"""Each rule among honest devices and attackers, beside the plain mean."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.adapters.state import AdapterKey, AdapterState, scaled
from sfl.compare.attackers import noise_like
from sfl.errors import AdapterError, SettingsError
from sfl.fed_server.merges import make_merge
from sfl.fed_server.robust import Combining, Robust, Screening, make_robust, required
from sfl.fed_server.robust import rows as rows_module
from sfl.fed_server.robust.krum import distances
from sfl.fed_server.robust.rows import rows
from sfl.fed_server.updates import Update
from sfl.federation_settings import RobustSettings
from tests.fed_server.made import same
from tests.fed_server.updates import PLACES, RANK, padded, random_delta, replaced, state, update

Attack = Callable[[AdapterState], AdapterState]
RULES = ("krum", "multi-krum", "bulyan", "median", "trimmed-mean", "norm-clip")
ATTACKS: dict[str, Attack] = {
    "sign flip": partial(scaled, factor=-50),
    "scaling": partial(scaled, factor=100),
    "gaussian": lambda delta: noise_like(delta, 30, np.random.default_rng(0)),
}
ATTACKERS = 2
AVERAGE = make_merge("average")


def rule(name: str, attackers: int = ATTACKERS, norm: float = 0.0) -> Robust:
    made = make_robust(RobustSettings(rule=name, attackers=attackers, norm=norm))
    assert made is not None
    return made


def honest(count: int, seed: int = 1, spread: float = 0.05) -> list[Update]:
    """Updates that are alike but for a little."""
    common = random_delta(AVERAGE, state(0), seed)
    made = []
    for number in range(count):
        own = random_delta(AVERAGE, state(0), seed + 1 + number, spread)
        made.append(update(f"device-{number:02}", {key: common[key] + own[key] for key in common}))
    return made


def attacked(updates: Sequence[Update], attack: Attack, first: int = 0) -> list[Update]:
    """The same with `ATTACKERS` of them attackers."""
    return [replaced(one, attack) if first <= i < first + ATTACKERS else one for i, one in enumerate(updates)]


def equal(updates: Sequence[Update], whole: float = 1.0) -> dict[str, float]:
    return {one.device: whole / len(updates) for one in updates}


def result(robust: Robust, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
    """What the rule adds to the global adapter under the plain average, for weights with a sum of 1."""
    if isinstance(robust, Combining):
        return robust.combine(updates, weights)
    assert isinstance(robust, Screening)
    screened = robust.screen(updates, weights)
    return mean(screened.updates, screened.weights)


def mean(updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
    zero = {key: np.zeros_like(value) for key, value in state(0).items()}
    return AVERAGE.merge(zero, updates, weights)


def far(delta: AdapterState, updates: Sequence[Update]) -> float:
    """How far a delta is from the mean of honest updates, as a multiple of the farthest of these."""
    centre = mean(updates, equal(updates))

    def away(other: AdapterState) -> float:
        return float(np.sqrt(sum(np.sum((other[key] - centre[key]) ** 2) for key in centre)))

    return away(delta) / max(away(one.delta()) for one in updates)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
@pytest.mark.parametrize("first", [0, 5])
def test_with_as_many_attackers_as_it_bears_a_rule_stays_among_the_honest_and_the_mean_does_not(
    name: str, attack: Attack, first: int
) -> None:
    everyone = honest(required(name, ATTACKERS) if name == "bulyan" else 7)
    pool = attacked(everyone, attack, first)
    true = [one for i, one in enumerate(everyone) if not first <= i < first + ATTACKERS]
    assert far(mean(pool, equal(pool)), true) > 5
    robust = result(rule(name), pool, equal(pool))
    if name == "norm-clip":  # which bounds what attackers add, and no more
        assert far(robust, true) < far(mean(pool, equal(pool)), true) / 5
        largest = max(one.norm() for one in true)
        assert np.sqrt(sum(np.sum(value**2) for value in robust.values())) <= 1.001 * largest
    else:
        assert far(robust, true) <= 1.0


@pytest.mark.parametrize("name", ["median", "trimmed-mean", "bulyan"])
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_every_value_of_a_combined_update_lies_between_those_of_honest_devices(name: str, attack: Attack) -> None:
    everyone = honest(11, spread=0.5)
    combined = result(rule(name), attacked(everyone, attack), equal(everyone))
    deltas = [one.delta() for one in everyone[ATTACKERS:]]
    for key, value in combined.items():
        assert (value >= np.min([delta[key] for delta in deltas], axis=0) - 1e-6).all()
        assert (value <= np.max([delta[key] for delta in deltas], axis=0) + 1e-6).all()


@pytest.mark.parametrize("name", ["krum", "multi-krum"])
def test_the_rejected_are_named_with_their_reason_and_the_weight_stays(name: str) -> None:
    everyone = honest(7)
    pool = attacked(everyone, partial(scaled, factor=100))
    weights = {one.device: 0.1 + 0.01 * i for i, one in enumerate(pool)}
    robust = rule(name)
    assert isinstance(robust, Screening)
    screened = robust.screen(pool, weights)
    assert {"device-00", "device-01"} <= screened.rejected.keys()
    assert screened.rejected["device-00"].startswith(f"{name}: its distance")
    assert [one.device for one in screened.updates] == sorted(screened.weights)
    assert screened.weights.keys() | screened.rejected.keys() == weights.keys()
    assert sum(screened.weights.values()) == pytest.approx(sum(weights.values()))
    assert len(screened.updates) == {"krum": 1, "multi-krum": 5}[name]
    if name == "multi-krum":
        ratio = {device: screened.weights[device] / weights[device] for device in screened.weights}
        assert len({round(value, 9) for value in ratio.values()}) == 1, "in proportion to their own"


def brute_force_scores(updates: Sequence[Update], attackers: int) -> dict[str, float]:
    flat = {one.device: np.concatenate([value.ravel() for _, value in sorted(one.delta().items())]) for one in updates}
    scores = {}
    for device, mine in flat.items():
        away = sorted(float(np.sum((mine - other) ** 2)) for name, other in flat.items() if name != device)
        scores[device] = sum(away[: len(updates) - attackers - 2])
    return scores


@given(st.integers(0, 10**6), st.integers(0, 2))
@settings(max_examples=15, deadline=None)
def test_krum_chooses_by_its_equation(seed: int, attackers: int) -> None:
    pool = honest(8, seed, spread=1.0)
    scores = brute_force_scores(pool, attackers)
    for name, count in (("krum", 1), ("multi-krum", 8 - attackers)):
        robust = rule(name, attackers)
        assert isinstance(robust, Screening)
        assert robust.screen(pool, equal(pool)).weights.keys() == set(sorted(scores, key=scores.__getitem__)[:count])


@pytest.mark.parametrize("attackers", [0, 1, 2])
def test_median_and_trimmed_mean_are_those_of_the_values(attackers: int) -> None:
    pool = honest(6, spread=1.0)
    deltas = [one.delta() for one in pool]
    median, trimmed = (result(rule(name, attackers), pool, equal(pool)) for name in ("median", "trimmed-mean"))
    for key in deltas[0]:
        values = np.sort([delta[key] for delta in deltas], axis=0)
        np.testing.assert_allclose(median[key], (values[2] + values[3]) / 2, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(trimmed[key], values[attackers : 6 - attackers].mean(axis=0), rtol=1e-5, atol=1e-6)
        assert median[key].dtype == trimmed[key].dtype == np.float32


def test_bulyan_is_krum_again_and_again_and_then_the_values_around_the_median() -> None:
    pool = honest(9, spread=1.0)
    left, chosen = list(pool), []
    while len(chosen) < 7:
        scores = brute_force_scores(left, 1)
        best = min(left, key=lambda one: scores[one.device])
        chosen.append(best)
        left.remove(best)
    combined = result(rule("bulyan", 1), pool, equal(pool))
    for key in combined:
        values = np.stack([one.delta()[key] for one in chosen]).reshape(7, -1)
        for column, value in zip(values.T, combined[key].ravel()):
            nearest = sorted(column, key=lambda each: abs(each - np.median(column)))[:5]
            assert value == pytest.approx(np.mean(nearest), abs=1e-5)


def test_clipping_takes_the_median_norm_or_the_one_that_is_set() -> None:
    pool = [replaced(one, partial(scaled, factor=1 + i)) for i, one in enumerate(honest(5))]
    norms = [one.norm() for one in pool]
    for limit, robust in ((norms[2], rule("norm-clip", 1)), (norms[1] / 2, rule("norm-clip", 1, norms[1] / 2))):
        assert isinstance(robust, Screening)
        screened = robust.screen(pool, equal(pool))
        assert screened.weights == equal(pool) and not screened.rejected
        for one, before, size in zip(screened.updates, pool, norms):
            assert one.norm() == pytest.approx(min(size, limit), rel=1e-5)
            assert (one.device in screened.changed) == (size > limit)
            if size <= limit:
                assert same(one.delta(), before.delta())
    key = AdapterKey(0, "q", "A")
    assert screened.updates[4].delta([key]).keys() == {key}


@pytest.mark.parametrize("name", RULES)
@given(order=st.permutations(range(11)))
@settings(max_examples=10, deadline=None)
def test_the_order_of_updates_does_not_matter_to_the_bit(name: str, order: list[int]) -> None:
    pool = honest(11, spread=1.0)
    shuffled = [pool[i] for i in order]
    assert same(result(rule(name), pool, equal(pool)), result(rule(name), shuffled, equal(shuffled)))


@pytest.mark.parametrize("name", RULES)
def test_all_alike_are_believed(name: str) -> None:
    pool = honest(11, spread=0.0)
    for key, value in result(rule(name), pool, equal(pool)).items():
        np.testing.assert_allclose(value, pool[0].delta()[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("krum", "norm-clip")])
def test_claimed_examples_do_not_decide_whom_to_believe(name: str) -> None:
    pool = attacked(honest(11), partial(scaled, factor=-10))
    greedy = {one.device: 0.45 if i < ATTACKERS else 0.1 / 9 for i, one in enumerate(pool)}
    assert far(result(rule(name), pool, greedy), honest(11)[ATTACKERS:]) <= 1.0


@pytest.mark.parametrize(
    ("name", "attackers", "least"),
    [("krum", 2, 7), ("multi-krum", 2, 7), ("bulyan", 2, 11), ("median", 2, 5), ("trimmed-mean", 2, 5), ("norm-clip", 2, 5)],
)
def test_a_rule_works_with_the_least_number_of_updates_that_it_asks_for(name: str, attackers: int, least: int) -> None:
    assert required(name, attackers) == least
    pool = attacked(honest(least), partial(scaled, factor=-10))
    true = honest(least)[attackers:]
    assert far(result(rule(name, attackers), pool, equal(pool)), true) < far(mean(pool, equal(pool)), true) / 3


def test_an_unknown_rule_is_refused_and_none_is_none() -> None:
    with pytest.raises(SettingsError, match=r"no robust rule 'mean': choose one of krum"):
        required("mean", 1)
    assert make_robust(RobustSettings()) is None


def test_smaller_ranks_are_padded_with_zeros() -> None:
    ranks = [2, RANK, 1, RANK, 3]
    pool = [
        update(f"device-{i}", random_delta(AVERAGE, AVERAGE.view(state(0), rank), i), rank=rank) for i, rank in enumerate(ranks)
    ]
    like = pool[1].delta()
    whole = [padded(one.delta(), like, one.rank) for one in pool]
    flat = [np.concatenate([delta[key].ravel() for key in sorted(delta)]) for delta in whole]
    for (i, mine), (j, other) in itertools.product(enumerate(flat), repeat=2):
        assert distances(pool)[i, j] == pytest.approx(np.sum((mine - other) ** 2), rel=1e-4, abs=1e-4)
    combined = result(rule("median", 1), pool, equal(pool))
    for key in like:
        np.testing.assert_allclose(combined[key], np.median([delta[key] for delta in whole], axis=0), atol=1e-6)


def test_large_tensors_are_gone_through_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = honest(7, spread=1.0)
    expected, squares = result(rule("trimmed-mean"), pool, equal(pool)), distances(pool)
    monkeypatch.setattr(rows_module, "_VALUES", 7 * 4)
    assert max(values.size for _, _, _, values in rows(pool)) == 7 * 4
    assert same(result(rule("trimmed-mean"), pool, equal(pool)), expected)
    np.testing.assert_allclose(distances(pool), squares, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("name", ["krum", "median"])
def test_an_update_with_other_tensors_is_named(name: str) -> None:
    pool = honest(7)
    key = AdapterKey(*PLACES[0], "B")
    pool[3] = pool[3].changed(lambda delta: {k: v for k, v in delta.items() if k != key})
    with pytest.raises(AdapterError, match=r"device 'device-03' lacks the tensor 0/q/B"):
        result(rule(name), pool, equal(pool))
    pool[3] = honest(7)[3].changed(lambda delta: {**delta, key: np.zeros((7, 9), np.float32)})
    with pytest.raises(AdapterError, match=r"0/q/B has shape \(7, 9\) in the update of device 'device-03', expected \(7, 4\)"):
        result(rule(name), pool, equal(pool))
