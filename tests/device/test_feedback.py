"""The learning rate's controller against factors worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.device.feedback import RateController, rate_controller
from sfl.errors import WireError
from sfl.v1.federation_pb2 import Feedback, UploadPolicy


def controller(**changes: Any) -> RateController:
    return RateController(Feedback(**{"decrease": 0.5, "increase": 1.5, "lowest": 0.2, "patience": 2, "margin": 0.1, **changes}))


def factors(rate: RateController, losses: list[float]) -> list[float]:
    found = []
    for loss in losses:
        rate.look(loss)
        found.append(rate.factor)
    return found


def test_by_hand() -> None:
    by_hand = [  # loss, factor
        (1.0, 1.0),  # the best yet
        (1.2, 1.0),  # worse, the first
        (1.2, 0.5),  # worse, the second in a row
        (1.2, 0.5),  # a new row begins
        (1.3, 0.25),
        (1.3, 0.25),
        (1.3, 0.2),  # 0.125 is below the lowest
        (0.9, 0.3),  # better
        (0.8, 0.45),
        (0.85, 0.45),  # neither: within a tenth of 0.8
        (0.7, 0.675),
        (0.6, 1.0),  # never above 1
        (0.5, 1.0),
    ]
    assert factors(controller(), [loss for loss, _ in by_hand]) == pytest.approx([factor for _, factor in by_hand])


def test_only_looks_in_a_row_count() -> None:
    assert factors(controller(), [1.0, 2.0, 1.05, 2.0, 1.1, 2.0, 0.9, 2.0]) == [1.0] * 8


def test_patience_sets_how_many() -> None:
    for patience in (1, 2, 3):
        found = factors(controller(patience=patience), [1.0, 2.0, 2.0, 2.0])
        assert found == [1.0] * patience + [0.5] + found[patience + 1 :]


def test_better_is_measured_by_the_best_and_not_by_the_last() -> None:
    assert factors(controller(patience=1), [1.0, 3.0, 2.0, 1.05, 0.99]) == pytest.approx([1.0, 0.5, 0.25, 0.25, 0.375])


def test_a_best_near_zero_has_a_floor() -> None:
    assert factors(controller(patience=1, margin=0.2), [0.0001, 0.0100, 0.0102]) == [1.0, 1.0, 0.5]  # 0.0001 + 0.2 * 0.05


def test_no_number_is_worse() -> None:
    assert factors(controller(patience=1), [float("nan"), float("inf"), 2.0, float("nan")]) == [0.5, 0.5, 0.75, 0.375]


@given(st.lists(st.floats(0, 100), max_size=50))
def test_the_factor_keeps_to_its_bounds_and_moves_for_a_reason(losses: list[float]) -> None:
    rate, best = controller(), float("inf")
    for loss in losses:
        before = rate.factor
        rate.look(loss)
        assert 0.2 <= rate.factor <= 1
        if rate.factor > before:
            assert loss < best
        if rate.factor < before:
            assert loss > 1.1 * best
        best = min(best, loss)


def test_off_unless_asked_for() -> None:
    assert rate_controller(UploadPolicy()) is None
    asked = UploadPolicy(feedback=Feedback(decrease=0.5, increase=1, lowest=0.5, patience=1))
    assert rate_controller(asked) is not None


@pytest.mark.parametrize(
    "change",
    [
        *({"decrease": 0}, {"decrease": 1.1}, {"increase": 0.9}, {"increase": float("inf")}, {"lowest": 0}, {"lowest": 2}),
        *({"patience": 0}, {"margin": -0.1}, {"margin": float("nan")}),
    ],
)
def test_a_controller_that_cannot_be(change: dict[str, Any]) -> None:
    with pytest.raises(WireError, match="mend the federation server's settings"):
        controller(**change)
