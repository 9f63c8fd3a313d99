"""The metrics file when the disk is full, or when the power went while it was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfl.cluster.metrics import read_events
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import no_file_above


def test_on_a_full_disk_events_are_lost_and_nothing_else_comes_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write("first")
        with no_file_above(path.stat().st_size + 10):
            for _ in range(3):
                metrics.write("lost")
        metrics.write("second")
    assert [event["event"] for event in read_events(path)] == ["first", "second"]
    assert caplog.text.count("events are lost") == 1


def test_a_line_that_was_cut_off_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as metrics:
        metrics.write("first")
        metrics.write("torn")
    path.write_bytes(path.read_bytes()[:-9])
    with MetricsWriter(path) as metrics:
        metrics.write("second")
    assert [event["event"] for event in read_events(path)] == ["first", "second"]
