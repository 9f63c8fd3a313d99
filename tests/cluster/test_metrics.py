"""Metrics of runs that were broken off and gone on with."""

from __future__ import annotations

from pathlib import Path

from sfl.cluster.metrics import Event, read_events, settled
from sfl.cluster.progress import DeviceProgress
from sfl.telemetry import MetricsWriter


def step(number: int, **more: object) -> Event:
    return {"event": "step", "step": number, "loss": float(number), **more}


def test_steps_that_were_done_again_are_there_once(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "metrics.jsonl") as metrics:
        metrics.write("start")
        for number in (1, 2, 3, 4):
            metrics.write("step", step=number, loss=1.0)
        metrics.write("adopt", step=4, version=1)
        metrics.write("submit", step=2, submission="s/1")
        metrics.write("start")
        metrics.write("resume", step=2, checkpoint=5)
        metrics.write("submit", step=2, submission="s/1")
        for number in (3, 4, 5):
            metrics.write("step", step=number, loss=2.0)
        metrics.write("resume", step=5, checkpoint=6)
        metrics.write("submit", step=5, submission="s/2")
    events = read_events(tmp_path / "metrics.jsonl")
    steps = [(event["step"], event["loss"]) for event in events if event["event"] == "step"]
    assert steps == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [event["submission"] for event in events if event["event"] == "submit"] == ["s/1", "s/2"]
    assert [event["event"] for event in events].count("adopt") == 0  # its step was gone back behind
    assert [event["event"] for event in events].count("resume") == 2


def test_an_edge_goes_back_with_one_device_alone() -> None:
    events = [step(1, device="a"), step(2, device="a"), step(2, device="b"), {"event": "resume", "device": "a", "step": 1}]
    assert settled(events) == [events[0], *events[2:]]


def test_steps_of_a_device_that_began_anew_are_gone_at_its_edge_server_too() -> None:
    opened = [{"event": "session", "device": "a", "state": "open", "step": at} for at in (0, 2, 0)]
    events = [opened[0], step(1, device="a"), step(2, device="a"), opened[1], step(3, device="a"), opened[2], step(1, device="a")]
    assert settled(events) == [*opened, events[-1]]


def test_a_federation_server_that_goes_on_has_no_steps() -> None:
    events = [{"event": "aggregate", "version": 1}, {"event": "resume", "version": 1}, {"event": "aggregate", "version": 2}]
    assert settled(events) == events


def test_progress_goes_back_too() -> None:
    device = DeviceProgress("device-1", "2", 10)
    device.take(step(7))
    device.take({"event": "resume", "step": 4, "version": 1})
    assert (device.step, device.version) == (4, 1)
