"""The peak of the whole process outlives that its count begins anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfl.telemetry import peak_rss_mb, peak_since_restart_mb, restart_peak


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_whole_peak_is_kept() -> None:
    large = np.ones(20_000_000)
    before = peak_rss_mb()
    assert before > 160
    del large
    assert restart_peak()
    assert peak_since_restart_mb() < before - 100
    assert peak_rss_mb() == pytest.approx(before, abs=1)
