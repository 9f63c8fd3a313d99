"""Peaks, means and spans from points and changes of phase."""

from __future__ import annotations

import pytest

from sfl.profiling.timeline import COUNT, MOST_POINTS, MOST_SPANS, Series, Timeline


def end(timeline: Timeline, phase: str, at_s: float, mb: float, peak_mb: float | None) -> bool:
    """End the phase and go on with another."""
    result = timeline.end(at_s, mb, peak_mb)
    timeline.phase = phase
    return result


def test_the_step_in_which_tensors_are_counted_is_kept_apart() -> None:
    timeline = Timeline("forward", 10.0)
    end(timeline, COUNT, 1.0, 50.0, None)
    assert not end(timeline, "forward", 2.0, 50.0, 90.0)
    assert timeline.peak_mb == 50.0 and timeline.totals[COUNT].peak_mb == 90.0


def test_peaks_means_and_spans() -> None:
    timeline = Timeline("import", 10.0)
    timeline.add(1.0, 20.0)
    assert end(timeline, "load", 2.0, 20.0, None)
    timeline.add(3.0, 60.0)
    assert end(timeline, "forward", 4.0, 40.0, 75.0)  # the kernel saw more than the samples did
    assert not end(timeline, "idle", 5.0, 50.0, 55.0)
    load = timeline.totals["load"]
    assert (load.count, load.seconds, load.peak_mb) == (1, 2.0, 75.0)
    assert load.mean_mb == pytest.approx((20 / 2 + 60 / 2 + 60 / 2 + 40 / 2) / 2)
    assert timeline.totals["import"].mean_mb == pytest.approx((15.0 + 20.0) / 2)
    assert timeline.peak is not None and (timeline.peak.phase, timeline.peak.peak_mb, timeline.peak_at_s) == ("load", 75.0, 3.0)
    assert [span.phase for span in timeline.spans] == ["import", "load", "forward"]


def test_memory_that_is_freed_late_does_not_move_the_peak() -> None:
    timeline = Timeline("backward", 10.0)
    timeline.add(1.0, 100.0)
    end(timeline, "idle", 2.0, 99.0, None)
    timeline.add(3.0, 100.2)
    end(timeline, "step", 4.0, 50.0, None)
    assert timeline.peak is not None and timeline.peak.phase == "backward"


def test_a_long_run_takes_bounded_space_and_keeps_its_peak() -> None:
    series = Series()
    for number in range(100_000):
        series.add(number * 0.01, 500.0 if number == 54_321 else float(number % 7))
    assert len(series.points) <= MOST_POINTS
    assert max(series.points, key=lambda point: point[1]) == (543.21, 500.0)
    assert [at for at, _ in series.points] == sorted(at for at, _ in series.points)
    timeline = Timeline("step", 1.0)
    for number in range(3 * MOST_SPANS):
        end(timeline, ("step", "forward")[number % 2], float(number), 1.0, None)
    assert len(timeline.spans) == MOST_SPANS
    assert timeline.totals["step"].count + timeline.totals["forward"].count == 3 * MOST_SPANS
