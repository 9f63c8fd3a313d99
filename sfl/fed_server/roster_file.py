"""Who takes part, on disk: `roster.state`, from which a server that is started anew knows whom to expect."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from sfl.adapters.layout import LoraSpec
from sfl.errors import StateError, StateWriteError
from sfl.fed_server.members import Member
from sfl.fed_server.reach import Reach
from sfl.fed_server.roster import Attendance, Roster
from sfl.state_file import read_state, write_state
from sfl.telemetry import log

FILE = "roster.state"


class RosterFile:
    """Keeps a roster, with what is known of its devices' reach, in `folder`; without one nothing is kept. `newest` is the newest
    version now.

    `restored` is the number of members that it took up from there, and `finished` says whether their run had come to its end;
    `behind` that there was no room for what has changed. Raises `StateError` for a damaged file.
    """

    def __init__(self, folder: Path | None, roster: Roster, reach: Reach | None, newest: int | None = None) -> None:
        self.restored = 0
        self.finished = False
        self.behind = False
        self._path = None if folder is None else folder / FILE
        self._roster = roster
        self._reach = reach
        if self._path is not None and self._path.exists():
            self._restore(self._path, newest)

    def _restore(self, path: Path, newest: int | None) -> None:
        document, _ = read_state(path)
        try:
            self.finished = bool(document["finished"])
            members = [_attendance(fields) for fields in document["members"]]
            gathered = bool(document["gathered"])
            join_left_s = document["join_until"] - time.time()
            reach = {str(device): (usual_s, bool(failing)) for device, (usual_s, failing) in document["reach"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StateError(f"{path} is no roster of this version of sfl ({error!r}); delete it to begin without it") from error
        self._roster.restore(members, gathered, max(0.0, min(join_left_s, self._roster.join_left_s())), newest)
        if self._reach is not None:
            self._reach.restore(reach)
        self.restored = len(members)

    def keep(self, finished: bool) -> None:
        """As `write`, or later where the disk is full: who joins or comes back will do so again at the next server."""
        try:
            self.write(finished)
        except StateWriteError as error:
            if not self.behind:
                log.error("%s; it is tried again", error)
            self.behind = True

    def write(self, finished: bool) -> None:
        """Keep the roster as it is. Raises `StateWriteError` when the disk does not take it."""
        if self._path is None:
            return
        document = {
            "finished": finished,
            "gathered": self._roster.has_gathered,
            "join_until": time.time() + self._roster.join_left_s(),
            "members": [dataclasses.asdict(attendance) for attendance in self._roster.attendance()],
            "reach": {} if self._reach is None else self._reach.known(),
        }
        write_state(self._path, document, {})
        self.behind = False


def _attendance(fields: dict[str, Any]) -> Attendance:
    member = dict(fields["member"])
    lora = dict(member.pop("lora"))
    lora["target_modules"] = tuple(lora["target_modules"])
    for name in ("labels", "columns", "label_counts"):
        member[name] = tuple(member[name])
    return Attendance(
        Member(lora=LoraSpec(**lora), **member),
        bool(fields["trained"]),
        bool(fields["left"]),
        tuple(fields["edges"]),
        tuple(map(int, fields["fetched"])),
    )
