"""Metrics followed while they are written, shown, and summed up."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sfl.cluster.cluster import Cluster
from sfl.cluster.demo import DemoOptions, plan_demo
from sfl.cluster.metrics import Follower
from sfl.cluster.progress import Progress
from sfl.cluster.report import Curve, draw_losses, smoothed, summary_table
from sfl.cluster.summary import newest_adapter, summarise
from sfl.errors import SflError
from sfl.telemetry import MetricsWriter


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(plan_demo(DemoOptions(model="some/model", out=tmp_path / "out", steps=3)))


def report(cluster: Cluster, steps: int = 3, end: bool = True, tested: bool = True) -> None:
    """Write what the daemons would."""
    for number, device in enumerate(cluster.devices, 1):
        with MetricsWriter(cluster.metrics(device.name)) as metrics:
            metrics.write("start", name=device.name, cut=device.cut, train=30, validation=5, test=9, steps=3)
            for step in range(1, steps + 1):
                metrics.write(
                    "step", step=step, version=step // 2, loss=2.0 / step, bytes_sent=1000 * step, bytes_received=500 * step
                )
            metrics.write("adopt", step=2, version=1)
            metrics.write("eval", split="validation", accuracy=0.1, f1_macro=0.1, loss=9.0)
            if tested:
                metrics.write("eval", split="test", accuracy=0.5 + number / 10, f1_macro=0.4, loss=1.25)
            if end:
                metrics.write(
                    "end", steps=steps, examples=24, submissions=number, bytes_sent=5_000_000, bytes_received=7, peak_rss_mb=100.5
                )
    with MetricsWriter(cluster.metrics("edge-1")) as metrics:
        metrics.write("end", steps=9, bytes_received=11, bytes_sent=12, peak_rss_mb=300.0)
    with MetricsWriter(cluster.metrics("fed")) as metrics:
        metrics.write("aggregate", version=1, devices={})
        metrics.write("end", version=1, aggregations=1, submissions=6, bytes_received=13, bytes_sent=14, peak_rss_mb=40.0)


def test_a_follower_waits_for_the_file_and_for_whole_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.new() == []
    with path.open("a") as file:
        file.write('{"event": "start"}\n{"event": "st')
        file.flush()
        assert [event["event"] for event in follower.new()] == ["start"]
        assert follower.new() == []
        file.write('ep", "step": 1}\nrubbish\n{"event": "end"}\n')
        file.flush()
        assert [event["event"] for event in follower.new()] == ["step", "end"]


def test_progress_follows_the_devices(cluster: Cluster) -> None:
    stream = io.StringIO()
    with Progress(cluster, Console(file=stream, width=200)) as progress:
        progress.tick()
        assert {device.state for device in progress.devices} == {"starting"}
        report(cluster, end=False)
        progress.tick()
        first = progress.devices[0]
        assert (first.state, first.step, first.version, first.bytes_sent) == ("testing", 3, 1, 3000)
        assert first.loss == pytest.approx(0.8 * (0.8 * 2 + 0.2 * 1) + 0.2 * 2 / 3)
        assert progress.version == 1
        assert stream.getvalue() == ""  # a line every few seconds only
        progress._last_line -= 10
        progress.tick()
    assert stream.getvalue().count("\n") == 1
    assert "version 1" in stream.getvalue() and "device-3 3/3 loss" in stream.getvalue()


def test_on_a_terminal_progress_is_a_table(cluster: Cluster) -> None:
    stream = io.StringIO()
    report(cluster)
    with Progress(cluster, Console(file=stream, width=200, force_terminal=True)) as progress:
        progress.tick()
        shown = stream.getvalue()
    assert "device-2" in shown and "3/3" in shown and "done" in shown


def test_the_summary_holds_what_scripts_rely_on(cluster: Cluster) -> None:
    report(cluster)
    summary = summarise(cluster)
    assert summary["strategy"] == "gsfs" and summary["model"] == "some/model" and summary["task"] == "classification"
    assert summary["devices"][1] == {
        "name": "device-2", "cut": 2, "steps": 3, "examples": 24, "submissions": 2, "bytes_sent": 5_000_000, "bytes_received": 7,
        "peak_rss_mb": 100.5, "accuracy": 0.7, "f1_macro": 0.4, "loss": 1.25,
    }  # fmt: skip
    assert summary["edges"] == [{"name": "edge-1", "steps": 9, "bytes_received": 11, "bytes_sent": 12, "peak_rss_mb": 300.0}]
    assert summary["fed"]["aggregations"] == 1 and summary["fed"]["version"] == 1
    json.dumps(summary)
    whole = {**summary, "wall_s": 3.0, "central": {"loss": 1.0, "accuracy": 0.875, "f1_macro": 0.5}}
    stream = io.StringIO()
    Console(file=stream, width=160).print(summary_table(whole))
    for text in ("device-3", "0.800", "5.0 MB", "edge-1", "central adapter v1", "0.875", "training and then each device's test"):
        assert text in stream.getvalue()


def test_what_was_not_tested_has_no_figures(cluster: Cluster) -> None:
    report(cluster, tested=False)
    summary = summarise(cluster)
    assert [(device["accuracy"], device["f1_macro"], device["loss"]) for device in summary["devices"]] == [(None, None, None)] * 3
    stream = io.StringIO()
    central = {"loss": None, "count": 0, "accuracy": None, "f1_macro": None, "classes": None}
    Console(file=stream, width=160).print(summary_table({**summary, "wall_s": 3.0, "central": central}))
    assert "device-3" in stream.getvalue() and "nan" not in stream.getvalue() and "0.000" not in stream.getvalue()


def test_a_run_without_an_end_is_not_summed_up(cluster: Cluster) -> None:
    report(cluster, end=False)
    with pytest.raises(SflError, match=r"device-1/metrics\.jsonl holds no event 'end'"):
        summarise(cluster)


def test_the_newest_version_is_found_by_number(tmp_path: Path) -> None:
    with pytest.raises(SflError, match="no version"):
        newest_adapter(tmp_path)
    for name in ("v2", "v10", "v9", ".v11.tmp", "vx"):
        (tmp_path / name).mkdir()
    assert newest_adapter(tmp_path).name == "v10"


@pytest.mark.parametrize("devices", [1, 3, 12])
def test_the_picture_is_drawn(tmp_path: Path, devices: int) -> None:
    events = [{"event": "step", "step": i, "version": 0, "loss": 2 / i} for i in range(1, 40)] + [
        {"event": "adopt", "step": 9, "version": 1}
    ]
    curves = [Curve.from_events(f"device-{i}", events) for i in range(devices)]
    assert curves[0].adopted == [(9, 1)] and len(curves[0].steps) == 39
    path = tmp_path / "loss.png"
    draw_losses(path, curves, "a title")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_smoothing_keeps_length_and_constants() -> None:
    assert smoothed([3.0] * 50) == pytest.approx(np.full(50, 3.0))
    assert smoothed([0.0, 3.0, 0.0]) == pytest.approx([1.5, 1.0, 1.5])
    assert len(smoothed([])) == 0
