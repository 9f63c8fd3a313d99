"""What members report of themselves, from the events that they write."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sfl.phases import phase
from sfl.watching.vitals import DeviceVitals, EdgeVitals, Process, WaitClock
from sfl.wire.frames import Traffic


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def device(clock: Clock) -> Iterator[DeviceVitals]:
    with WaitClock(clock) as waits:
        yield DeviceVitals("pi-1", Process(clock), waits)


def step(number: int, wall_s: float = 0.5, **more: Any) -> dict[str, Any]:
    return {
        "step": number,
        "version": 3,
        "loss": 0.25,
        "wall_s": wall_s,
        "examples": 8,
        "bytes_sent": 0,
        "bytes_received": 0,
        **more,
    }


def test_a_device_tells_where_its_seconds_go(device: DeviceVitals, clock: Clock) -> None:
    device.hear("start", {"steps": 40})
    for number, (own, edge) in enumerate([(0.1, 0.4), (0.2, 0.6), (0.1, 5.0)], 1):
        clock.now += own
        with phase("wait"):
            clock.now += edge
        device.hear("step", step(number, own + edge))
    clock.now += 7
    report = device.report()
    assert (report.name, report.steps, report.planned_steps, report.version) == ("pi-1", 3, 40, 3)
    assert report.loss == 0.25
    assert report.step_s == pytest.approx(0.8)  # the median: one slow step is none
    assert report.edge_wait_s == pytest.approx(0.6)
    assert report.step_age_s == pytest.approx(7)
    assert report.uptime_s == pytest.approx(0.4 + 6.0 + 7)
    assert report.stepping


def test_a_wait_between_two_steps_is_not_the_next_steps(device: DeviceVitals, clock: Clock) -> None:
    device.hear("start", {"steps": 2})
    with phase("wait"):
        clock.now += 50  # whatever it was for
    device.hear("step", step(1, 0.5))
    assert device.report().edge_wait_s == pytest.approx(0.5)


def test_only_what_is_known_is_reported(device: DeviceVitals) -> None:
    report = device.report()
    assert not any(report.HasField(name) for name in ("loss", "step_s", "edge_wait_s", "step_age_s", "upload_s"))
    assert report.activity == "starting"
    assert not report.stepping
    assert report.memory_bytes > 1e6
    assert report.peak_memory_bytes >= report.memory_bytes / 2


def test_activities(device: DeviceVitals) -> None:
    said = []
    for name in ("join", "tokenise", "load", "round"):
        with phase(name):
            said.append(device.report().activity)
    device.hear("start", {"steps": 2})
    device.hear("resume", {"step": 1, "version": 2, "submissions": 3, "checkpoint": 4})
    resumed = device.report()
    assert (resumed.steps, resumed.version, resumed.submissions) == (1, 2, 3)
    for name in ("forward", "wait", "round"):
        with phase(name):
            report = device.report()
            said.append(report.activity)
            assert report.stepping is (name != "round")
    device.hear("step", step(2))
    said.append(device.report().activity)
    device.hear("end", {"bytes_sent": 0, "bytes_received": 0})
    said.append(device.report().activity)
    assert said == [
        "waiting for all devices to join",
        "reading its data",
        "loading its half of the model",
        "waiting for the next version",
        "training",
        "waiting for its edge server",
        "waiting for the next version",
        "testing",
        "done",
    ]


def test_versions_and_uploads(device: DeviceVitals) -> None:
    device.hear("adopt", {"version": 9, "step": 3, "dropped_steps": 0})
    device.hear("submit", {"trigger": "final", "upload_s": 1.5})
    device.hear("submit", {"trigger": "final"})
    report = device.report()
    assert (report.version, report.submissions, report.upload_s) == (9, 2, 1.5)


def test_bytes_are_those_with_all_peers(clock: Clock) -> None:
    process = Process(clock)
    for peer, sent in (("edge", 10), ("federation", 5)):
        process.traffic[peer] = Traffic()
        process.traffic[peer].add(sent=sent, received=2 * sent)
    report = process.report("pi-1", "training")
    assert (report.bytes_sent, report.bytes_received) == (15, 30)


def test_a_devices_bytes_are_those_of_its_run_also_after_it_was_started_again(device: DeviceVitals) -> None:
    traffic = device._process.traffic["edge"] = Traffic()
    device.goes_on(5000, 300)
    traffic.add(sent=100, received=10)
    assert moved(device) == (5100, 310), "also before its first step"
    device.hear("resume", {"step": 6, "version": 3, "submissions": 2})
    assert moved(device) == (5100, 310)
    device.hear("step", step(7, bytes_sent=4100, bytes_received=210))  # it went on from an earlier checkpoint than the newest
    assert moved(device) == (4100, 210)
    traffic.add(sent=50)
    device.hear("step", step(8, bytes_sent=4150, bytes_received=210))
    traffic.add(received=7)
    assert moved(device) == (4150, 217)


def test_the_last_bytes_of_a_device_are_those_of_its_end(device: DeviceVitals) -> None:
    traffic = device._process.traffic["edge"] = Traffic()
    traffic.add(sent=70, received=7)
    device.hear("start", {"steps": 40})
    device.hear("resume", {"step": 40, "version": 3, "submissions": 5})  # in its test: there are no more steps
    device.hear("end", {"steps": 40, "bytes_sent": 9070, "bytes_received": 907})
    assert moved(device) == (9070, 907)


def moved(device: DeviceVitals) -> tuple[int, int]:
    report = device.report()
    return report.bytes_sent, report.bytes_received


def test_an_edge_server_tells_of_each_session(clock: Clock) -> None:
    edge = EdgeVitals("edge-1", Process(clock))
    assert edge.report().activity == "waiting for all devices to join"
    for device, compute_s, queue_s in (("a", 0.2, 0.0), ("b", 0.4, 1.0), ("b", 0.4, 1.0)):
        edge.hear("session", {"device": device, "state": "open", "step": 0})
        edge.hear("step", {"device": device, "step": 7, "version": 1, "loss": 1.0, "wall_s": compute_s, "queue_s": queue_s})
    clock.now += 4
    report = edge.report()
    assert (report.activity, report.steps) == ("serving 2 devices", 3)
    told = {each.device: (each.step, each.compute_s, each.queue_s, each.step_age_s) for each in report.sessions}
    assert told == {"a": (7, 0.2, 0.0, 4.0), "b": (7, 0.4, 1.0, 4.0)}
    assert edge.ages() == {"a": 4.0, "b": 4.0}


def test_sessions_that_end_are_forgotten_and_those_of_devices_that_are_gone_are_not(clock: Clock) -> None:
    edge = EdgeVitals("edge-1", Process(clock))
    for device in ("a", "b", "c", "d"):
        edge.hear("session", {"device": device, "state": "open", "step": 0})
    for device, state in (("a", "closed"), ("b", "forgotten"), ("c", "gone")):
        edge.hear("session", {"device": device, "state": state, "step": 3})
    assert [each.device for each in edge.report().sessions] == ["c", "d"]
    assert edge.sessions == 2
