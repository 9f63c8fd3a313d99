"""The recorder on its own: what it says where the kernel tells it less, and the energy of the steps."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from sfl.phases import phase
from sfl.profiling import process_memory, recorder
from sfl.profiling.recorder import Recorder
from sfl.profiling.summary import summarise
from sfl.profiling.table import headline, tables


class Joule:
    """A meter of one joule a tick."""

    source = "a test"
    joules = 0.0

    def tick(self, now: float) -> None:
        self.joules += 1.0


def record(meter: Joule | None = None, steps: int = 1) -> Recorder:
    """The phases of a few steps; forward holds 40 MB."""
    watcher = Recorder(meter)
    with watcher.recording():
        with phase("import"):
            pass
        for _ in range(steps):
            with phase("forward"):
                large = np.ones(5_000_000)
                time.sleep(0.03)
                del large
            with phase("step"):
                time.sleep(0.01)
    return watcher


def test_without_a_peak_that_can_be_counted_anew_there_are_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "restart_peak", lambda: False)
    profile = summarise(
        record(), {"model": "m", "cut": 1, "precision": "fp32", "compute": "fp32", "batch_size": 1, "max_length": 8}
    )
    assert not profile.peak.exact and "from samples" in headline(profile)
    forward = next(each for each in profile.phases if each.name == "forward")
    assert forward.peak_mb == pytest.approx(max(mb for _, mb in profile.rss if mb <= forward.peak_mb))
    assert profile.parts[1].mb is None and sum(part.mb or 0 for part in profile.parts) == pytest.approx(profile.peak.rss_mb)
    assert tables(profile)


def test_without_proc_there_is_the_peak_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_memory, "text_of", lambda path: None)
    monkeypatch.setattr(recorder, "restart_peak", lambda: False)
    profile = summarise(record(), {}, root=Path("/nowhere"))
    assert profile.peak.rss_mb > 10
    assert all(moment.rss_mb is None and moment.uss_mb is None for moment in profile.moments.values())
    assert profile.uss == () and profile.energy is None and profile.board.identity.cpu is None


def test_joules_of_the_steps_and_of_nothing_else() -> None:
    meter = Joule()
    energy = summarise(record(meter, steps=3), {}).energy
    assert energy is not None and energy.steps == 3 and energy.source == "a test"
    # One tick where the first step begins, one at the end of each, and what the sampler adds between.
    assert 4 <= energy.joules <= meter.joules
    assert energy.joules_per_step == pytest.approx(energy.joules / 3)


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="needs /proc to read the resident memory")
def test_the_floor_is_after_the_imports_whatever_a_daemon_does_before() -> None:
    watcher = Recorder()
    with watcher.recording():
        with phase("provision"):
            pass
        before = watcher.floor_mb
        with phase("import"):
            kept = np.ones(5_000_000)
        with phase("load"):
            later = np.ones(5_000_000)
        with phase("import"):  # something that was put off
            del later
    assert before is not None and watcher.floor_mb is not None
    assert 35 < watcher.floor_mb - before < 60 and len(kept)
