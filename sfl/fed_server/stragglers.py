"""Who is behind the others, and why, from what members report. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from statistics import median

_SLOW = 1.5  # times the others' median from which a step is slow
_LEAST_S = 0.05  # that it must be longer as well: differences below are nobody's concern
_STALLED = 10  # times a device's usual step after which it is said that none comes,
_STALLED_S = 30.0  # and seconds after which that is said at the earliest
_SLOW_LINK = 4  # times the others' median from which an upload is slow
_LEAST_UPLOAD_S = 1.0


@dataclass(frozen=True)
class Pace:
    """How fast a device goes: seconds of a step, and what of them it waited for its edge server.

    Of that wait, `compute_s` is what the edge's part takes and `queue_s` the time until its turn, both None where the edge server
    has not told; the rest is the link. `activity` is what the device says that it does. `bytes_per_s` is its uplink's.
    """

    step_s: float
    edge_wait_s: float
    step_age_s: float
    activity: str
    edge: str = ""
    compute_s: float | None = None
    queue_s: float | None = None
    bytes_per_s: float | None = None
    upload_s: float | None = None

    def parts(self) -> dict[str, float]:
        """The seconds of a step by where they go: own, link, queue, edge; link has what is not known in more detail."""
        own = max(0.0, self.step_s - self.edge_wait_s)
        if self.compute_s is None or self.queue_s is None:
            return {"own": own, "link": self.edge_wait_s}
        link = max(0.0, self.edge_wait_s - self.compute_s - self.queue_s)
        return {"own": own, "link": link, "queue": self.queue_s, "edge": self.compute_s}


def stragglers(paces: Mapping[str, Pace], training: Collection[str]) -> dict[str, str]:
    """Why each device that is behind is so, in words, by name.

    `training` are the devices that are to make steps now: others, which wait for a version or test, are compared with, but never
    behind.
    """
    return {
        name: why
        for name in training
        if name in paces and (why := _why(paces[name], [pace for other, pace in paces.items() if other != name])) is not None
    }


def _why(pace: Pace, others: list[Pace]) -> str | None:
    if pace.step_age_s > max(_STALLED_S, _STALLED * pace.step_s):
        return f"no step for {pace.step_age_s:.0f} s: {pace.activity}"
    if not others:
        return None
    usual = median(other.step_s for other in others)
    if pace.step_s > _SLOW * usual and pace.step_s > usual + _LEAST_S:
        return _slow_step(pace, others)
    uplinks = [other.bytes_per_s for other in others if other.bytes_per_s]
    if uplinks and pace.bytes_per_s and pace.upload_s is not None and pace.upload_s > _LEAST_UPLOAD_S:
        usual = median(uplinks)
        if _SLOW_LINK * pace.bytes_per_s < usual:
            return f"slow uplink: {_rate(pace.bytes_per_s)}, others {_rate(usual)}"
    return None


def _slow_step(pace: Pace, others: list[Pace]) -> str:
    """The part of the step that is most above the others'."""
    parts, of_others = pace.parts(), [other.parts() for other in others]
    usual = {name: median(found) if (found := [part[name] for part in of_others if name in part]) else 0.0 for name in parts}
    worst = max(parts, key=lambda name: parts[name] - usual[name])
    edge = f"edge server {pace.edge}" if pace.edge else "its edge server"
    where = {
        "own": "it computes slowly itself",
        "link": f"slow link to {edge}" if "edge" in parts else f"slow link to {edge}, or that is slow",
        "queue": f"it waits its turn at {edge}",
        "edge": f"{edge} computes slowly",
    }[worst]
    return f"{where}: {parts[worst]:.2f} of {pace.step_s:.2f} s a step, others {usual[worst]:.2f} s"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e6:.2f} MB/s" if bytes_per_s >= 1e5 else f"{bytes_per_s / 1e3:.1f} kB/s"
