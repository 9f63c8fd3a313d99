"""What the daemons report in their metrics files, read while they write."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sfl.errors import SflError
from sfl.telemetry import log

Event = dict[str, Any]


class Follower:
    """Reads a `metrics.jsonl` piece by piece as it grows; the file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0
        self._line = 0

    def new(self) -> list[Event]:
        """The events whose lines were completed since the last call. A damaged line is logged and left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")  # a line without its end is still being written
        except FileNotFoundError:
            return []
        self._offset += len(whole) + len(newline)
        events = []
        for line in whole.splitlines() if newline else []:
            self._line += 1
            try:
                event = json.loads(line)
            except ValueError:
                log.warning("%s, line %d, is not JSON and was left out", self.path, self._line)
                continue
            if isinstance(event, dict) and "event" in event:
                events.append(event)
        return events


def read_events(path: Path) -> list[Event]:
    """All events of a finished run, in order, as if no process of it had ever died; none if the file is missing."""
    return settled(Follower(path).new())


def settled(events: Iterable[Event]) -> list[Event]:
    """`events` without those of steps that a process of the run did and, gone back to a checkpoint, did again.

    A "resume" says to which step someone has gone back, and so does an edge server's "session" that is opened: its device may
    have begun anew. A submission counts once, however often it was sent.
    """
    kept: list[Event] = []
    submissions = set[str]()
    for event in events:
        opened = event["event"] == "session" and event["state"] == "open"
        if opened or (event["event"] == "resume" and "step" in event):
            kept = [earlier for earlier in kept if not _undone(earlier, event)]
        if event["event"] == "submit" and "submission" in event:
            if event["submission"] in submissions:
                continue
            submissions.add(event["submission"])
        kept.append(event)
    return kept


def _undone(earlier: Event, resume: Event) -> bool:
    """Whether it was reported of a step that comes after the one to which its device has gone back."""
    of_steps = earlier["event"] in ("step", "adopt", "eval")
    return of_steps and earlier.get("device") == resume.get("device") and earlier["step"] > resume["step"]


def last(events: list[Event], kind: str, path: Path, **wanted: object) -> Event:
    """The last event of this kind with these fields. Raises `SflError` if there is none: the run was not whole."""
    for event in reversed(events):
        if event["event"] == kind and all(event.get(name) == value for name, value in wanted.items()):
            return event
    what = " ".join([kind, *(f"{name}={value}" for name, value in wanted.items())])
    raise SflError(f"{path} holds no event '{what}': the daemon did not come to its end; see the log beside it")
