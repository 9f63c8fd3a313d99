"""Who is behind, and why."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from sfl.fed_server.stragglers import Pace, stragglers

USUAL = Pace(step_s=0.5, edge_wait_s=0.3, step_age_s=0.2, activity="training", edge="edge-1", compute_s=0.1, queue_s=0.1)
OTHERS = {"a": USUAL, "b": replace(USUAL, step_s=0.55), "c": replace(USUAL, step_s=0.45)}


def why(pace: Pace, others: dict[str, Pace] | None = None, training: bool = True) -> str | None:
    """What is said of `slow` among the others."""
    paces = {**(OTHERS if others is None else others), "slow": pace}
    found = stragglers(paces, paces if training else paces.keys() - {"slow"})
    assert found.keys() <= {"slow"}
    return found.get("slow")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"step_s": 0.7, "edge_wait_s": 0.3}, None),  # less than one and a half times the others'
        ({"step_s": 2.2, "edge_wait_s": 0.3}, r"it computes slowly itself: 1\.90 of 2\.20 s a step, others 0\.20 s"),
        ({"step_s": 2.2, "edge_wait_s": 2.0}, r"slow link to edge server edge-1: 1\.80 of 2\.20 s a step, others 0\.10 s"),
        (
            {"step_s": 2.2, "edge_wait_s": 2.0, "queue_s": 1.7},
            r"it waits its turn at edge server edge-1: 1\.70 of 2\.20 s a step, others 0\.10 s",
        ),
        (
            {"step_s": 2.2, "edge_wait_s": 2.0, "compute_s": 1.7},
            r"edge server edge-1 computes slowly: 1\.70 of 2\.20 s a step, others 0\.10 s",
        ),
        (
            {"step_s": 2.2, "edge_wait_s": 2.0, "compute_s": None, "queue_s": None, "edge": ""},
            r"slow link to its edge server, or that is slow: 2\.00 of 2\.20 s a step, others 0\.10 s",
        ),
        ({"step_age_s": 29.0}, None),
        ({"step_age_s": 95.0}, "no step for 95 s: training"),
        ({"step_age_s": 95.0, "activity": "waiting for its edge server"}, "no step for 95 s: waiting for its edge server"),
        ({"step_s": 20.0, "step_age_s": 95.0, "edge_wait_s": 0.1}, "it computes slowly itself"),  # a step takes that long
    ],
)
def test_the_reason_is_the_part_that_is_most_above_the_others(changes: dict[str, float], expected: str | None) -> None:
    found = why(replace(USUAL, **changes))  # type: ignore[arg-type]
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert re.match(expected, found), found


def test_small_differences_are_nobodys_concern() -> None:
    fast = replace(USUAL, step_s=0.01, edge_wait_s=0.005, compute_s=0.001, queue_s=0.0)
    assert why(replace(fast, step_s=0.03), {"a": fast}) is None


def test_a_slow_uplink_is_told_when_uploads_take_long() -> None:
    others = {name: replace(USUAL, bytes_per_s=4e6, upload_s=0.1) for name in ("a", "b")}
    slow = replace(USUAL, bytes_per_s=2e4, upload_s=20.0)
    assert why(slow, others) == "slow uplink: 20.0 kB/s, others 4.00 MB/s"
    assert why(replace(slow, upload_s=0.5), others) is None
    assert why(replace(slow, bytes_per_s=2e6), others) is None


def test_who_makes_no_steps_is_never_behind() -> None:
    assert why(replace(USUAL, step_s=9.0, step_age_s=500.0, activity="waiting for the next version"), training=False) is None


def test_who_is_alone_is_behind_nobody_but_may_be_stalled() -> None:
    assert why(replace(USUAL, step_s=9.0), {}) is None
    assert why(replace(USUAL, step_age_s=60.0), {}) == "no step for 60 s: training"
