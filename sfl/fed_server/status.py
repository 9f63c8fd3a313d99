"""What the federation server tells those who watch it: itself, and each member with its own last report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from sfl import __version__
from sfl.errors import WireError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.roster import Presence
from sfl.fed_server.stragglers import Pace, stragglers
from sfl.v1 import federation_pb2 as pb
from sfl.watching.vitals import Process

_SILENT_S = 10.0  # without a connection, after which a member is silent; with one, once `_LOST` reports are missing
_LOST = 3
_LONGEST = 200  # characters of what a member says that it does
_MOST_SESSIONS = 10_000
_ROLES = {"device": pb.DEVICE, "edge": pb.EDGE}
_FIGURES = ("uptime_s", "every_s", "step_age_s", "step_s", "edge_wait_s", "upload_s")
_SESSION_FIGURES = ("compute_s", "queue_s", "step_age_s")


class _Reported(NamedTuple):
    """A report and when it came, in the clock's seconds."""

    at: float
    report: pb.ReportRequest


class StatusBoard:
    """Keeps the last report of each member, and hears (`hear`) the federation server's own events.

    Nothing here changes what the federation does. `process` is that of the server.
    """

    def __init__(
        self,
        federation: Federation,
        name: str = "fed",
        process: Process | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._federation = federation
        self._name = name
        self._process = process or Process(clock)
        self._clock = clock
        self._reports: dict[str, _Reported] = {}  # by member
        self._links: dict[str, pb.Link] = {}  # by device
        self._version_made: float | None = None

    def hear(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take note of an event of the federation server's."""
        if event == "upload":
            rate, trip = fields["bytes_per_s"] or 0.0, fields["round_trip_s"] or 0.0
            self._links[fields["device"]] = pb.Link(bytes_per_s=rate, round_trip_s=trip, failures=fields["failures"])
        elif event == "aggregate":
            self._version_made = self._clock()

    def report(self, request: pb.ReportRequest) -> None:
        """Keep a member's report. Raises `UnknownMemberError` for who has not joined, `WireError` for figures that are none."""
        member = self._federation.heard(request.name)
        _check(request)
        if member.role == "device":
            del request.sessions[:]
        self._reports[request.name] = _Reported(self._clock(), request)

    def joined(self, name: str) -> None:
        """A member has joined, or has come back: what an earlier process of its name has reported is over."""
        self._reports.pop(name, None)

    def status(self) -> pb.StatusReply:
        """Everything at this moment."""
        federation, own = self._federation, self._process.report(self._name, "")
        presences = sorted(self.presences(), key=lambda each: (each.member.role, each.member.name))
        reply = pb.StatusReply(
            time=time.time(),
            sfl=__version__,
            name=self._name,
            uptime_s=own.uptime_s,
            state=self._state(presences),
            joined=federation.joined,
            expected=federation.expected,
            aggregations=federation.aggregations,
            submissions=federation.submissions,
            refused=federation.refused,
            pooled=federation.pooled(),
            memory_bytes=own.memory_bytes,
            bytes_sent=own.bytes_sent,
            bytes_received=own.bytes_received,
        )
        if federation.version is not None:
            reply.version = federation.version
        if self._version_made is not None:
            reply.version_age_s = self._clock() - self._version_made
        slow, counts, sessions = self.slow(), federation.submissions_by_device(), self._sessions()
        for presence in presences:
            name = presence.member.name
            edge = sessions[name][0] if name in sessions else presence.member.edge
            reply.members.append(self._member(presence, edge, counts.get(name, 0), slow.get(name, "")))
        return reply

    def presences(self) -> list[Presence]:
        """All members; of those that the federation takes to be there it is said who has stopped, and who is silent."""
        return [self._seen(each) if each.state == "present" else each for each in self._federation.presences()]

    def _seen(self, present: Presence) -> Presence:
        reported = self._reports.get(present.member.name)
        if self._ended(present.member.name):
            return replace(present, state="stopped")
        heard_s = present.heard_s
        if reported is not None and reported.report.every_s:  # a connection that is cut off looks open for a while
            age_s = self._clock() - reported.at
            if age_s >= _LOST * reported.report.every_s:
                heard_s = max(heard_s, age_s)
        return present if heard_s < _SILENT_S else replace(present, state="silent", heard_s=heard_s)

    def _ended(self, name: str) -> bool:
        """Whether a member's last word was that it stops."""
        reported = self._reports.get(name)
        return reported is not None and reported.report.ended

    def slow(self) -> dict[str, str]:
        """Why members are behind or not there, by name."""
        now, sessions, presences = self._clock(), self._sessions(), self.presences()
        away: dict[str, str] = {}
        for each in presences:
            if each.state in ("silent", "away"):
                what = "stopped, and" if self._ended(each.member.name) else f"{each.state}:"
                away[each.member.name] = f"{what} not heard of for {each.heard_s:.0f} s"
        paces: dict[str, Pace] = {}
        stepping: set[str] = set()
        for each in presences:
            name = each.member.name
            reported = self._reports.get(name)
            if each.member.role != "device" or each.state != "present" or reported is None:
                continue
            report = reported.report
            if not (report.HasField("step_s") and report.HasField("step_age_s")):
                continue
            edge, session = sessions.get(name, (each.member.edge, pb.SessionReport()))
            paces[name] = Pace(
                step_s=report.step_s,
                edge_wait_s=report.edge_wait_s,
                step_age_s=report.step_age_s + (now - reported.at),
                activity=report.activity,
                edge=edge,
                compute_s=session.compute_s if session.HasField("compute_s") else None,
                queue_s=session.queue_s if session.HasField("queue_s") else None,
                bytes_per_s=self._links[name].bytes_per_s if name in self._links else None,
                upload_s=report.upload_s if report.HasField("upload_s") else None,
            )
            if report.stepping:
                stepping.add(name)
        return away | stragglers(paces, stepping)

    def ages(self) -> dict[str, float]:
        """Seconds since the last step of each device that has reported one, and has not left: who is done makes no more."""
        now = self._clock()
        stays = {each.member.name for each in self._federation.presences() if each.state != "left"}
        return {
            name: reported.report.step_age_s + (now - reported.at)
            for name, reported in list(self._reports.items())
            if name in stays and reported.report.HasField("step_age_s")
        }

    def _state(self, presences: Sequence[Presence]) -> str:
        """What the federation is doing or waiting for, in words."""
        federation = self._federation
        if federation.failure is not None:
            return f"failed: {federation.failure}"
        if federation.finished:
            return "finished"
        joined = f"{federation.joined} of {federation.expected} have joined"
        if federation.agreement is None:
            return f"waiting for devices: {joined}"
        if federation.version is None:
            return "waiting for an edge server to propose version 0"
        if federation.held_up:
            return f"held up: {federation.held_up}"
        states = {each.member.name: each.state for each in presences if each.member.role == "device"}
        if "present" not in states.values():
            return "waiting: no device is there"
        if federation.lacks_devices:  # it goes on with more `devices` than before, or was given the labels
            return f"no new version before more devices are here: {joined}"
        pooled = set(federation.pooled())
        missing = [
            name if state == "present" else f"{name} ({state})"
            for name, state in sorted(states.items())
            if name not in pooled and state not in ("away", "left")  # these are not waited for
        ]
        if not pooled or not missing:
            return "training"
        return f"training; the pool has updates of {', '.join(sorted(pooled))}, none yet of {', '.join(missing)}"

    def _sessions(self) -> dict[str, tuple[str, pb.SessionReport]]:
        """The edge server that last reported a session of a device, and what it said, by device; of devices that say which edge
        server they have, only that one is believed."""
        edges = {each.member.name: each.member.edge for each in self._federation.presences()}
        return {
            session.device: (name, session)
            for name, reported in sorted(self._reports.items(), key=lambda item: item[1].at)
            for session in reported.report.sessions
            if edges.get(session.device) in ("", name)
        }

    def _member(self, presence: Presence, edge: str, submissions: int, slow: str) -> pb.MemberStatus:
        member = presence.member
        status = pb.MemberStatus(
            name=member.name,
            role=_ROLES[member.role],
            presence=presence.state,
            heard_s=presence.heard_s,
            cut=member.cut,
            examples=member.examples,
            edge=edge,
            submissions=submissions,
            slow=slow,
        )
        if member.name in self._links:
            status.link.CopyFrom(self._links[member.name])
        if (reported := self._reports.get(member.name)) is not None:
            status.report.CopyFrom(reported.report)
            status.report_age_s = self._clock() - reported.at
        return status


def _check(request: pb.ReportRequest) -> None:
    """Raise `WireError` for figures and words that are none."""
    if any(len(text) > _LONGEST or not text.isprintable() for text in (request.activity, request.sfl)):
        raise WireError(f"a report of {request.name} says in odd words, or too many, what it does")
    if any(len(session.device) > _LONGEST for session in request.sessions):
        raise WireError(f"a report of {request.name} names a device that nobody is")
    if len(request.sessions) > _MOST_SESSIONS:
        raise WireError(f"a report of {request.name} names {len(request.sessions)} sessions")
    figures = [getattr(request, name) for name in _FIGURES]
    figures += [getattr(session, name) for session in request.sessions for name in _SESSION_FIGURES]
    if not all(0 <= value < math.inf for value in figures) or not math.isfinite(request.loss):
        raise WireError(f"a report of {request.name} holds a figure that is below 0, or no number")
