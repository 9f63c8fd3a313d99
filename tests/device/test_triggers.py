"""Upload rules against numbers computed by hand from equations 7 to 11."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.device.trainer import Figures
from sfl.device.triggers import GradientTrigger, PerformanceTrigger, threshold_factor, upload_rule
from sfl.errors import WireError
from sfl.v1.federation_pb2 import NetworkSense, Periodic, Triggered, UploadPolicy


def figures(loss: float, accuracy: float | None = None, f1: float | None = None) -> Figures:
    return Figures(loss, 10, accuracy, f1)


def test_gradient_trigger_by_hand() -> None:
    trigger = GradientTrigger(alpha=0.5, beta=1.0)
    by_hand = [  # norm, then mu, sigma and mu + beta sigma
        (4.0, False),  # 4, 0: 4
        (8.0, True),  # 6, 0.5 * 2 = 1: 7
        (6.0, False),  # 6, 0.5: 6.5
        (6.4, False),  # 6.2, 0.25 + 0.1 = 0.35: 6.55
        (2.2, False),  # 4.2, 0.175 + 1 = 1.175: 5.375
        (7.0, True),  # 5.6, 0.5875 + 0.7 = 1.2875: 6.8875
        (7.0, False),  # 6.3, 0.64375 + 0.35 = 0.99375: 7.29375
    ]
    assert [trigger.observe({0: norm}) for norm, _ in by_hand] == [fires for _, fires in by_hand]


def test_beta_sets_the_sensitivity() -> None:
    # After 4, the norm 8 has mu 6 and sigma 1: it fires below beta = 2 and not at it.
    for beta, fires in ((1.9, True), (2.0, False), (2.1, False)):
        trigger = GradientTrigger(0.5, beta)
        trigger.observe({0: 4.0})
        assert trigger.observe({0: 8.0}) is fires


def test_each_layer_has_its_own_range_and_any_of_them_fires() -> None:
    trigger = GradientTrigger(0.5, 1.0)
    assert not trigger.observe({0: 4.0, 1: 100.0})
    assert not trigger.observe({0: 4.0, 1: 90.0})
    assert trigger.observe({0: 8.0, 1: 80.0})
    assert not trigger.observe({0: 6.0, 1: 80.0, 7: 1e6})  # a layer seen for the first time


@given(st.floats(1e-20, 1e20), st.floats(0.001, 0.999), st.floats(0, 5))
def test_a_norm_that_never_changes_never_fires(norm: float, alpha: float, beta: float) -> None:
    trigger = GradientTrigger(alpha, beta)
    assert not any(trigger.observe({0: norm}) for _ in range(20))


def test_performance_trigger_by_hand() -> None:
    trigger = PerformanceTrigger("loss", threshold=0.1, growth=3.0, decay=0.5)
    by_hand = [  # loss; |dM| against share * reference
        (2.0, False),  # the reference
        (1.9, False),  # 0.1 against 0.1 * 2; the share becomes 0.05
        (2.15, True),  # 0.15 against 0.05 * 2, in either direction; 0.15
        (1.75, False),  # 0.25 against 0.15 * 2; 0.075
        (1.84, True),  # 0.16 against 0.075 * 2; 0.225
    ]
    assert [trigger.observe(figures(loss)) for loss, _ in by_hand] == [fires for _, fires in by_hand]
    trigger.refer_to(figures(1.0))
    assert not trigger.observe(figures(1.22))  # 0.22 against 0.225; 0.1125
    assert trigger.observe(figures(0.88))  # 0.12 against 0.1125


def test_a_reference_near_zero_has_a_floor() -> None:
    trigger = PerformanceTrigger("loss", 0.1, 1.0, 1.0)
    trigger.refer_to(figures(0.0))
    assert not trigger.observe(figures(0.0049))  # 0.1 * 0.05
    assert trigger.observe(figures(0.0051))


def test_the_metric_is_the_one_that_was_asked_for() -> None:
    for metric, moved in (("accuracy", figures(1.0, 0.9, 0.5)), ("f1", figures(1.0, 0.5, 0.9)), ("loss", figures(2.0, 0.5, 0.5))):
        for other in ("accuracy", "f1", "loss"):
            trigger = PerformanceTrigger(other, 0.1, 1.0, 1.0)
            trigger.refer_to(figures(1.0, 0.5, 0.5))
            assert trigger.observe(moved) is (other == metric)
    with pytest.raises(WireError, match="watches 'f1', which this task does not have; choose loss"):
        PerformanceTrigger("f1", 0.1, 1.0, 1.0).observe(figures(1.0))


def triggered(**changes: Any) -> Any:
    policy: dict[str, Any] = {"alpha": 0.5, "beta": 1.0, "min_steps": 3, "validate_every": 2, "threshold": 0.1, "metric": "loss"}
    policy |= {"threshold_growth": 1.0, "threshold_decay": 1.0, **changes}
    return upload_rule(UploadPolicy(triggered=Triggered(**policy)))


def test_uploads_are_min_steps_apart_and_validations_are_due_in_between() -> None:
    rule = triggered()
    rule.after_adoption(figures(1.0))
    assert not rule.waits
    seen = []
    for norm in (1.0, 2.0, 4.0, 8.0, 16.0, 32.0):  # from the second on, each fires
        due = rule.validation_due()
        trigger = rule.after_step({0: norm}, figures(1.0) if due else None)
        seen.append((due, trigger))
        if trigger:
            rule.after_upload()
    assert seen == [(False, None), (False, None), (True, "gradient")] * 2


def test_the_performance_trigger_is_looked_at_every_so_often() -> None:
    rule = triggered()
    rule.after_adoption(figures(1.0))
    seen = []
    for _ in range(8):
        due = rule.validation_due()
        seen.append((due, rule.after_step({0: 1.0}, figures(2.0) if due else None)))
    no, yes = (False, None), (True, "performance")
    assert seen == [no, no, yes, no, yes, no, yes, no]  # first when an upload is possible
    rule.after_adoption(figures(2.0))  # the reference is reset
    assert rule.validation_due()
    assert rule.after_step({0: 1.0}, figures(2.1)) is None
    assert rule.after_step({0: 9.0}, figures(3.0)) == "performance"  # named first when both fire


def test_uploads_do_not_put_off_the_next_look() -> None:
    rule = triggered(min_steps=1, validate_every=5)
    rule.after_adoption(figures(1.0))
    looks = []
    for step in range(1, 16):
        due = rule.validation_due()
        looks += [step] * due
        if rule.after_step({0: 2.0**step}, figures(1.0) if due else None):
            rule.after_upload()  # at each step but the first, as the norm grows
    assert looks == [5, 10, 15]


@pytest.mark.parametrize(("every", "validated"), [(0, [0, 1, 2, 3, 4, 5, 6, 7]), (1, [0, 1, 2, 3, 4, 5, 6, 7]), (3, [0, 3, 6])])
def test_a_reference_stays_for_some_steps_however_many_versions_are_adopted(every: int, validated: list[int]) -> None:
    rule = triggered(reference_every=every)
    seen = []
    for step in range(8):  # a version before each
        due = rule.reference_due()
        seen += [step] * due
        rule.after_adoption(figures(1.0) if due else None)
        rule.after_step({0: 1.0}, None)
    assert seen == validated


def test_validate_every_0_means_never() -> None:
    rule = triggered(validate_every=0)
    assert not rule.reference_due()
    rule.after_adoption(None)
    found = []
    for norm in (1.0, 1.0, 1.0, 1.0, 5.0):
        assert not rule.validation_due()
        found.append(rule.after_step({0: norm}, None))
    assert found == [None, None, None, None, "gradient"]


def test_rounds() -> None:
    rule = upload_rule(UploadPolicy(periodic=Periodic(local_steps=3)))
    assert rule.waits
    assert not rule.reference_due()
    found = []
    for _ in range(7):
        assert not rule.validation_due()
        found.append(rule.after_step({0: 1e9}, None))
        if found[-1]:
            rule.after_upload()
    assert found == [None, None, "round", None, None, "round", None]
    rule.after_adoption(None)  # in the middle of a round, a new one begins
    assert [rule.after_step({}, None) for _ in range(3)] == [None, None, "round"]


def test_an_unknown_rule() -> None:
    with pytest.raises(WireError, match="update this device"):
        upload_rule(UploadPolicy(keep_progress=True))


NETWORK = NetworkSense(budget=0.2, lowest=0.25, highest=4.0)


@pytest.mark.parametrize(
    ("upload_s", "step_s", "factor"),
    [(2.0, 1.0, 1.0), (4.0, 1.0, 2.0), (1.0, 1.0, 0.5), (1.0, 0.5, 1.0), (1e6, 1.0, 4.0), (0.0, 1.0, 0.25), (1.0, 0.0, 4.0)],
)
def test_the_factor_by_hand(upload_s: float, step_s: float, factor: float) -> None:
    assert threshold_factor(NETWORK, 10, upload_s, step_s) == pytest.approx(factor)


@given(st.floats(0, 1e9), st.floats(0, 1e9), st.integers(0, 1000))
def test_the_factor_keeps_to_its_bounds(upload_s: float, step_s: float, min_steps: int) -> None:
    assert 0.25 <= threshold_factor(NETWORK, min_steps, upload_s, step_s) <= 4


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.integers(1, 100))
def test_within_its_bounds_uploads_keep_to_the_budget(upload_s: float, step_s: float, min_steps: int) -> None:
    rule = triggered(min_steps=min_steps, network=NETWORK, validate_every=0, beta=0)
    rule.sense(upload_s, step_s)
    steps = 1
    while rule.after_step({0: float(steps)}, None) is None:  # a norm that grows, from the second on
        steps += 1
    assert steps == max(2, math.ceil(rule.factor * min_steps - 1e-9))
    if rule.factor < 4:
        assert upload_s <= 0.2 * steps * step_s * (1 + 1e-6)


def test_the_factor_widens_the_margin_of_the_gradient_trigger() -> None:
    # After 4, the norm 8 has mu 6 and sigma 1: it fires while f beta < 2.
    for factor, fires in ((0.95, True), (1.0, False), (1.05, False)):
        trigger = GradientTrigger(0.5, 2.0)
        trigger.observe({0: 4.0})
        assert trigger.observe({0: 8.0}, factor) is fires


def test_the_factor_on_the_performance_trigger_by_hand() -> None:
    trigger = PerformanceTrigger("loss", threshold=0.1, growth=3.0, decay=0.25)
    by_hand = [  # loss, f; |dM| against f * share * reference
        (2.0, 2.0, False),  # the reference
        (1.7, 2.0, False),  # 0.3 against 2 * 0.1 * 2; the share becomes 0.1 * sqrt(0.25)
        (1.79, 2.0, True),  # 0.21 against 2 * 0.05 * 2; 0.15
        (1.84, 0.5, True),  # 0.16 against 0.5 * 0.15 * 2; 0.45
        (1.6, 0.5, False),  # 0.4 against 0.5 * 0.45 * 2; 0.45 / 16
        (1.94, 1.0, True),  # 0.06 against 0.05625
    ]
    assert [trigger.observe(figures(loss), factor) for loss, factor, _ in by_hand] == [fires for *_, fires in by_hand]


def test_a_slow_link_lets_fewer_looks_fire_in_the_long_run() -> None:
    # Without the root in the decay, the share would fall until as many fire as without a factor.
    fired = {}
    for factor in (0.25, 1.0, 4.0):
        trigger, dice = PerformanceTrigger("loss", 0.1, 1.5, 0.8), random.Random(1)
        trigger.refer_to(figures(1.0))
        fired[factor] = sum(trigger.observe(figures(1 + dice.gauss(0, 0.1)), factor) for _ in range(2000))
    assert fired[0.25] > 1.5 * fired[1.0]
    assert fired[4.0] < 0.5 * fired[1.0]


@given(st.lists(st.floats(0.01, 100), min_size=5, max_size=60), st.floats(1e-3, 1e3))
def test_a_link_just_as_budgeted_changes_nothing(norms: list[float], step_s: float) -> None:
    plain, sensing = triggered(), triggered(network=NETWORK)
    found: list[list[str | None]] = [[], []]
    for norm in norms:
        for rule, seen in zip((plain, sensing), found):
            rule.sense(0.2 * 3 * step_s, step_s)
            due = rule.validation_due()
            seen.append(rule.after_step({0: norm}, figures(norm) if due else None))
            if seen[-1]:
                rule.after_upload()
    assert sensing.factor == pytest.approx(1.0)
    assert plain.factor == 1
    assert found[0] == found[1]


def test_no_bound_in_steps_unless_it_is_set() -> None:
    silent = triggered(validate_every=0)
    assert [silent.after_step({0: 1.0}, None) for _ in range(200)] == [None] * 200
    bounded = triggered(validate_every=0, max_steps=5)
    found = []
    for _ in range(12):
        found.append(bounded.after_step({0: 1.0}, None))
        if found[-1]:
            bounded.after_upload()
    assert found == [None] * 4 + ["overdue"] + [None] * 4 + ["overdue"] + [None] * 2


def test_a_trigger_that_fires_is_named_before_the_bound() -> None:
    rule = triggered(validate_every=0, max_steps=3)
    assert [rule.after_step({0: 4.0**step}, None) for step in range(3)] == [None, None, "gradient"]


def test_a_bound_below_the_least_distance_waits_for_it() -> None:
    rule = triggered(validate_every=0, max_steps=1)
    assert [rule.after_step({0: 1.0}, None) for _ in range(3)] == [None, None, "overdue"]


def test_a_look_is_due_no_sooner_than_the_stretched_distance() -> None:
    rule = triggered(network=NETWORK)
    rule.after_adoption(figures(1.0))
    rule.sense(1.2, 1.0)  # twice 0.2 * 3 steps of 1 s
    dues = []
    for _ in range(7):
        dues.append(rule.validation_due())
        rule.after_step({0: 1.0}, figures(1.0) if dues[-1] else None)
    assert dues == [False] * 5 + [True, False]


@pytest.mark.parametrize(
    "network",
    [
        NetworkSense(budget=0, lowest=0.5, highest=2),
        NetworkSense(budget=0.1, lowest=0, highest=2),
        NetworkSense(budget=0.1, lowest=3, highest=2),
        NetworkSense(budget=0.1, lowest=0.5, highest=float("inf")),
        NetworkSense(budget=float("nan"), lowest=0.5, highest=2),
    ],
)
def test_a_network_sense_that_cannot_be(network: NetworkSense) -> None:
    with pytest.raises(WireError, match=r"sense the network with budget .* mend its server's settings"):
        triggered(network=network)
