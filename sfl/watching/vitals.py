"""What a device or an edge server knows of itself at any moment, from the events that it writes; the source of its reports."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from types import TracebackType
from typing import Any, Protocol

from sfl import __version__, phases
from sfl.profiling.process_memory import resident_mb
from sfl.telemetry import peak_rss_mb
from sfl.v1.federation_pb2 import ReportRequest, SessionReport
from sfl.wire.frames import Traffic

_RECENT = 16  # steps whose median is what a step takes
_MEGA = 10**6
_TRAINING, _WAITING, DONE = "training", "waiting for its edge server", "done"
_DOING = {  # phases of a device in words for those who watch it
    "provision": "fetching its half of the model",
    "import": "starting",
    "join": "waiting for all devices to join",
    "tokenise": "reading its data",
    "load": "loading its half of the model",
    "round": "waiting for the next version",
}


class Vitals(Protocol):
    """A member's figures of this moment."""

    def hear(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take note of an event."""

    def report(self) -> ReportRequest:
        """What there is to report now."""


@dataclass
class _Recent:
    """The last values of something that each step has."""

    values: deque[float] = field(default_factory=lambda: deque(maxlen=_RECENT))

    def add(self, value: float) -> None:
        self.values.append(value)

    @property
    def median(self) -> float | None:
        return median(self.values) if self.values else None


class Process:
    """What every daemon can say of its process: how long it runs, its memory, and the bytes of `traffic`, which is added to."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.traffic: dict[str, Traffic] = {}  # by peer
        self.clock = clock
        self._started = clock()

    @property
    def uptime_s(self) -> float:
        return self.clock() - self._started

    def moved(self) -> tuple[int, int]:
        """Bytes sent and received by this process so far."""
        traffic = list(self.traffic.values())
        return sum(each.sent for each in traffic), sum(each.received for each in traffic)

    def report(self, name: str, activity: str) -> ReportRequest:
        """A report with these figures."""
        sent, received = self.moved()
        return ReportRequest(
            name=name,
            activity=activity,
            sfl=__version__,
            uptime_s=self.uptime_s,
            memory_bytes=round((resident_mb() or 0.0) * _MEGA),
            peak_memory_bytes=round(peak_rss_mb() * _MEGA),
            bytes_sent=sent,
            bytes_received=received,
        )


class WaitClock:
    """How long this process has been in the phase `wait`, in which a device waits for its edge server; a context manager."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.waited_s = 0.0
        self.phase = phases.IDLE
        self._clock = clock
        self._since = 0.0
        self._watching = phases.watching(self._enter)

    def _enter(self, phase: str) -> None:
        now = self._clock()
        if self.phase == "wait":
            self.waited_s += now - self._since
        self.phase, self._since = phase, now

    def __enter__(self) -> WaitClock:
        self._watching.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._watching.__exit__(kind, error, trace)


class DeviceVitals:
    """A device's. `waits` tells what the process does and how long it has waited for the edge server."""

    def __init__(self, name: str, process: Process, waits: WaitClock) -> None:
        self._name = name
        self._process = process
        self._waits = waits
        self._planned = 0
        self._step = 0
        self._version = 0
        self._submissions = 0
        self._upload_s: float | None = None
        self._loss: float | None = None
        self._last_step: float | None = None  # clock's seconds
        self._step_s, self._edge_wait_s = _Recent(), _Recent()
        self._waited_s = 0.0  # up to the last step
        self._ended = False
        self._bytes_before = 0, 0  # sent and received by processes before this one

    def hear(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "start":
            self._planned = int(fields["steps"])
            self._waited_s = self._waits.waited_s
        elif event in ("resume", "move"):
            self._step, self._version = int(fields["step"]), int(fields["version"])
            self._submissions = int(fields["submissions"])
        elif event == "step":
            self._step, self._version, self._loss = int(fields["step"]), int(fields["version"]), float(fields["loss"])
            self._last_step = self._process.clock()
            self._step_s.add(float(fields["wall_s"]))
            self._edge_wait_s.add(min(self._waits.waited_s - self._waited_s, float(fields["wall_s"])))
            self._waited_s = self._waits.waited_s
            self._count(fields)
        elif event == "adopt":
            self._version = int(fields["version"])
        elif event == "submit":
            self._submissions += 1
            self._upload_s = fields.get("upload_s", self._upload_s)
        elif event == "end":
            self._ended = True
            self._count(fields)

    def goes_on(self, sent: int, received: int) -> None:
        """Earlier processes of this device's run have moved so many bytes."""
        self._bytes_before = sent, received

    def _count(self, totals: Mapping[str, Any]) -> None:
        """Believe the totals of an event: at an earlier checkpoint than the newest, less had been moved."""
        sent, received = self._process.moved()
        self.goes_on(int(totals["bytes_sent"]) - sent, int(totals["bytes_received"]) - received)

    def report(self) -> ReportRequest:
        activity = self._activity()
        report = self._process.report(self._name, activity)
        report.stepping = activity in (_TRAINING, _WAITING)
        report.bytes_sent += self._bytes_before[0]
        report.bytes_received += self._bytes_before[1]
        report.steps, report.planned_steps = self._step, self._planned
        report.version, report.submissions = self._version, self._submissions
        for name, value in (
            ("loss", self._loss),
            ("step_age_s", self.step_age_s),
            ("step_s", self._step_s.median),
            ("edge_wait_s", self._edge_wait_s.median),
            ("upload_s", self._upload_s),
        ):
            if value is not None:
                setattr(report, name, value)
        return report

    @property
    def step_age_s(self) -> float | None:
        """Seconds since the last step; None before the first."""
        return None if self._last_step is None else self._process.clock() - self._last_step

    def _activity(self) -> str:
        if self._ended:
            return DONE
        phase = self._waits.phase
        if phase in _DOING:
            return _DOING[phase]
        if phase == phases.IDLE and not self._planned:
            return "starting"
        if self._planned and self._step >= self._planned:
            return "testing"
        return _WAITING if phase == "wait" else _TRAINING


@dataclass
class _Session:
    """What an edge server has seen of one device."""

    step: int = 0
    last: float | None = None  # clock's seconds
    compute_s: _Recent = field(default_factory=_Recent)
    queue_s: _Recent = field(default_factory=_Recent)


class EdgeVitals:
    """An edge server's. `activity` is what it says of itself while it has no sessions; its daemon changes that."""

    def __init__(self, name: str, process: Process) -> None:
        self.activity = "waiting for all devices to join"
        self._name = name
        self._process = process
        self._steps = 0
        self._sessions: dict[str, _Session] = {}

    @property
    def sessions(self) -> int:
        """How many devices have a session here, or had one a moment ago."""
        return len(self._sessions)

    def hear(self, event: str, fields: Mapping[str, Any]) -> None:
        if event == "session" and fields["state"] in ("closed", "forgotten"):
            self._sessions.pop(fields["device"], None)
        elif event == "session":
            self._sessions.setdefault(fields["device"], _Session())
        elif event == "step":
            self._steps += 1
            session = self._sessions.setdefault(fields["device"], _Session())
            session.step, session.last = int(fields["step"]), self._process.clock()
            session.compute_s.add(float(fields["wall_s"]))
            session.queue_s.add(float(fields["queue_s"]))

    def ages(self) -> dict[str, float]:
        """Seconds since the last step of each device that has made one."""
        now = self._process.clock()
        return {device: now - session.last for device, session in list(self._sessions.items()) if session.last is not None}

    def report(self) -> ReportRequest:
        sessions, ages = list(self._sessions.items()), self.ages()
        activity = f"serving {len(sessions)} device{'s' * (len(sessions) != 1)}" if sessions else self.activity
        report = self._process.report(self._name, activity)
        report.steps = self._steps
        for device, session in sessions:
            told = SessionReport(device=device, step=session.step)
            for name, value in (
                ("compute_s", session.compute_s.median),
                ("queue_s", session.queue_s.median),
                ("step_age_s", ages.get(device)),
            ):
                if value is not None:
                    setattr(told, name, value)
            report.sessions.append(told)
        return report
