from __future__ import annotations

import importlib.util
import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest

from sfl.adapters.state import FROZEN_A, FROZEN_B, AdapterState
from sfl.errors import SettingsError
from sfl.fed_server.merges import make_merge
from sfl.fed_server.privacy import Privacy
from sfl.federation_settings import PrivacySettings
from tests.fed_server.made import same
from tests.fed_server.updates import pool, state

needs_accounting = pytest.mark.skipif(
    importlib.util.find_spec("dp_accounting") is None, reason="dp-accounting is not installed: sfl[dp]"
)
DELTA = 1e-5


def private(spent: dict[str, float] | None = None, **settings: float | None) -> Privacy:
    return Privacy(PrivacySettings(**{"clip": 1.0, "delta": DELTA, **settings}), spent)


def independent_epsilon(sigma: float) -> float:
    """The root of Phi(1/(2 sigma) - e sigma) - exp(e) Phi(-1/(2 sigma) - e sigma) = delta (Balle and Wang 2018, theorem 8)."""

    def cumulative(value: float) -> float:
        return math.erfc(-value / math.sqrt(2)) / 2

    def delta(epsilon: float) -> float:
        return cumulative(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * cumulative(-0.5 / sigma - epsilon * sigma)

    low, high = 0.0, 100.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > DELTA else (low, middle)
    return high


def renyi_epsilon(sigma: float) -> float:
    """An upper bound: min over a of a / (2 sigma^2) + log(1 / delta) / (a - 1) (Mironov 2017, proposition 3)."""
    return min(a / (2 * sigma**2) + math.log(1 / DELTA) / (a - 1) for a in np.linspace(1.01, 500, 50_000))


# Clipping and noise


def test_updates_are_clipped_as_a_whole_and_smaller_ones_stay() -> None:
    merge, newest = make_merge("average"), state(1)
    (large,), (small,) = pool(merge, newest, [4], seed=1), pool(merge, newest, [2], seed=2, scale=0.01)
    small = small.changed(dict)
    admitted = private(clip=2.0).admit([large])
    assert large.norm() > 2
    assert admitted.updates[0].norm() == pytest.approx(2.0, rel=1e-5)
    assert admitted.clipped == {"device-0": pytest.approx(2 / large.norm())} and not admitted.refused
    before, after = large.delta(), admitted.updates[0].delta()
    for key in before:
        np.testing.assert_allclose(after[key] / before[key], 2 / large.norm(), rtol=1e-5)
    assert same(private(clip=2.0).admit([small]).updates[0].delta(), small.delta())


@pytest.mark.parametrize("name", ["average", "ffa"])
@needs_accounting
def test_noise_has_the_standard_deviation_of_the_greatest_weight_on_what_is_trained_alone(name: str) -> None:
    merge, newest = make_merge(name), state(2, frozen=2)
    privacy = private(clip=0.5, noise=3.0)
    trained = merge.trained(newest)
    values, expected = [], 3.0 * 0.5 * 0.4
    for _ in range(200):
        noisy = privacy.with_noise(newest, trained, {"a": 0.4, "b": 0.1})
        values.append(np.concatenate([(noisy[key] - newest[key]).ravel() for key in trained]))
        assert all(noisy[key] is newest[key] for key in newest.keys() - set(trained))
    assert {FROZEN_A, FROZEN_B} <= {key.part for key in newest.keys() - set(trained)}
    assert ("A" in {key.part for key in trained}) == (name == "average")
    drawn = np.concatenate(values)
    error = expected / math.sqrt(drawn.size)
    assert abs(drawn.mean()) < 5 * error
    assert abs(drawn.std() - expected) < 5 * error
    assert abs(np.mean(drawn**4) / expected**4 - 3) < 5 * math.sqrt(96 / drawn.size), (
        "not Gaussian"
    )  # whose fourth power varies by 96
    columns = np.stack(values)
    assert abs(np.corrcoef(columns[:-1].ravel(), columns[1:].ravel())[0, 1]) < 0.03, "versions share noise"


@needs_accounting
def test_noise_comes_from_its_own_generator() -> None:
    newest, weights = state(3), {"a": 1.0}
    before = np.random.get_state()[1].copy()

    def draw(seed: int | None) -> AdapterState:
        return private(noise=1.0, seed=seed).with_noise(newest, list(newest), weights)

    assert same(draw(7), draw(7))
    assert not same(draw(7), draw(8)) and not same(draw(None), draw(None))
    assert np.array_equal(np.random.get_state()[1], before)
    assert same(newest, state(3))


def test_without_noise_nothing_is_added_and_nothing_promised() -> None:
    privacy, newest = private(), state(4)
    assert same(privacy.with_noise(newest, list(newest), {"a": 1.0}), newest)
    assert privacy.after({"a": 1.0, "b": 0.0}) == {"a": math.inf} and privacy.epsilon("a") == math.inf
    assert privacy.epsilons() == {}


def test_where_it_is_off_updates_stay_as_they_are_and_no_account_is_kept() -> None:
    off, (large,) = private(clip=0.0), pool(make_merge("average"), state(1), [4], seed=1)
    admitted = off.admit([large])
    assert same(admitted.updates[0].delta(), large.delta()) and not admitted.clipped and not admitted.refused
    assert off.after({"a": 1.0}) == {}


@needs_accounting
def test_a_seed_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sfl"):
        private(noise=1.0)
        assert not caplog.records
        private(noise=1.0, seed=1)
    assert "privacy.seed is set" in caplog.text


# The account


@pytest.mark.parametrize(("noise", "versions"), [(3.730632, 1), (1.0, 1), (1.0, 20), (5.0, 100), (0.5, 3)])
@needs_accounting
def test_epsilon_is_that_of_an_independent_computation(noise: float, versions: int) -> None:
    privacy = private(noise=noise)
    for _ in range(versions):
        privacy.spent = privacy.after({"a": 0.5, "b": 0.5})
    composed = noise / math.sqrt(versions)
    assert privacy.epsilon("a") == pytest.approx(independent_epsilon(composed), rel=1e-6)
    assert privacy.epsilon("a") <= renyi_epsilon(composed)
    assert renyi_epsilon(composed) < 1.5 * privacy.epsilon("a"), "a bound that is near, or one of the two is wrong"


@needs_accounting
def test_known_values_and_the_librarys_own_accountants() -> None:
    from dp_accounting import GaussianDpEvent, NeighboringRelation, SelfComposedDpEvent, rdp

    privacy = private(noise=3.730632)  # sigma for (1, 1e-5) in Balle and Wang's own code
    privacy.spent = privacy.after({"a": 1.0})
    assert privacy.epsilon("a") == pytest.approx(1.0, abs=1e-4)
    privacy = private(noise=2.0)
    for _ in range(10):
        privacy.spent = privacy.after({"a": 1.0})
    accountant = rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    accountant.compose(SelfComposedDpEvent(GaussianDpEvent(2.0), 10))
    assert 0.9 * accountant.get_epsilon(DELTA) < privacy.epsilon("a") <= accountant.get_epsilon(DELTA)


@needs_accounting
def test_a_smaller_weight_hides_better_in_the_same_noise() -> None:
    privacy = private(noise=2.0)
    privacy.spent = privacy.after({"a": 0.5, "b": 0.125, "c": 0.0})
    assert privacy.epsilon("a") == pytest.approx(independent_epsilon(2.0), rel=1e-6)
    assert privacy.epsilon("b") == pytest.approx(independent_epsilon(8.0), rel=1e-6)
    assert privacy.epsilons().keys() == {"a", "b"} and max(privacy.epsilons().values()) == privacy.epsilon("a")


@needs_accounting
def test_a_spent_budget_refuses_the_device_by_name_and_no_other() -> None:
    merge, newest = make_merge("ffa"), state(5)
    updates = pool(merge, newest, [4, 4])
    budget = independent_epsilon(2.0 / math.sqrt(5)) + 1e-9  # five versions at full weight, and no sixth
    privacy = private(noise=2.0, epsilon=budget)
    taken = {"device-0": 0, "device-1": 0}
    for _ in range(30):
        admitted = privacy.admit(updates)
        if not admitted.updates:
            break
        weights = {one.device: {"device-0": 0.4, "device-1": 0.2}[one.device] for one in admitted.updates}
        for device in weights:
            taken[device] += 1
        privacy.spent = privacy.after(weights)
        assert all(epsilon <= budget for epsilon in privacy.epsilons().values())
        if taken["device-0"] == 5 and taken["device-1"] == 5:
            refused = privacy.admit(updates)
            assert [one.device for one in refused.updates] == ["device-1"], "at half the weight it has spent a quarter"
            assert "privacy budget is spent: epsilon is" in refused.refused["device-0"]
            assert f"past privacy.epsilon {budget:g}" in refused.refused["device-0"]
    assert taken == {"device-0": 5, "device-1": 5 + 3}, "alone it has the greatest weight: 5 / 4 + 3 versions' worth"
    assert not privacy.admit(updates).updates


@needs_accounting
def test_the_account_goes_on_after_a_restart() -> None:
    budget = independent_epsilon(1.0 / math.sqrt(3)) + 1e-9
    before = private(noise=1.0, epsilon=budget)
    for _ in range(2):
        before.spent = before.after({"a": 0.3})
    kept = json.loads(json.dumps(before.spent))
    after = private(kept, noise=1.0, epsilon=budget)
    assert after.epsilons() == before.epsilons() and not after.exhausted("a")
    after.spent = after.after({"a": 0.3})
    assert after.exhausted("a") and not after.exhausted("b")


@needs_accounting
def test_what_is_not_published_is_not_spent() -> None:
    privacy = private(noise=1.0)
    privacy.after({"a": 1.0})
    assert privacy.spent == {} and privacy.epsilon("a") == 0.0


# Settings


@needs_accounting
def test_a_budget_for_less_than_one_version_is_refused_with_what_would_do() -> None:
    with pytest.raises(SettingsError, match=r"privacy.noise 1 takes more than privacy.epsilon 1 .* privacy.noise to 3\.731"):
        private(noise=1.0, epsilon=1.0)
    private(noise=3.74, epsilon=1.0)


def test_a_missing_library_is_named_and_needed_for_noise_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(SettingsError, match=r"privacy.noise needs the library dp-accounting .* pip install 'sfl\[dp\]'"):
        private(noise=1.0)
    private()


@needs_accounting
def test_it_needs_no_torch_and_the_library_only_for_noise() -> None:
    script = """
import sys
from sfl.fed_server.privacy import Privacy
from sfl.federation_settings import PrivacySettings
assert "dp_accounting" not in sys.modules
Privacy(PrivacySettings(clip=1.0, noise=1.0))
assert "dp_accounting" in sys.modules
print(sorted({"torch", "transformers", "peft"} & sys.modules.keys()))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
