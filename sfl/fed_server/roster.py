"""Who takes part, and who of them is there."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Literal

from sfl.adapters.layout import AdapterLayout
from sfl.errors import FullError, NameTakenError, RefusedError, TrainingDiffersError, UnknownMemberError
from sfl.fed_server.members import MOST_EXAMPLES, Common, Member, Prompts
from sfl.telemetry import log

_EDGES = 2  # that a device is remembered to have had sessions with: of the one before, halves may still be on their way


@dataclass(frozen=True)
class Presence:
    """A member, whether it is there, and the seconds since it was last heard of; while it watches, 0.

    Of a member that counts as present `StatusBoard` knows more: whether it has stopped or is silent.
    """

    member: Member
    state: Literal["present", "stopped", "silent", "away", "left"]
    heard_s: float


@dataclass
class _Entry:
    member: Member
    seen: float  # clock's seconds
    watches: int = 0
    trained: bool = False  # a device has done all its steps, and is yet to evaluate
    left: bool = False
    returns: bool = False  # it was there before the server was started anew, and has not been heard of since
    edges: tuple[str, ...] = ()  # the last ones that a device has had sessions with, the newest last
    fetched: set[int] = field(default_factory=set)  # the last version, which a device trains on, or those that it may be


@dataclass(frozen=True)
class Attendance:
    """A member as it is kept for a server that is started anew."""

    member: Member
    trained: bool
    left: bool
    edges: tuple[str, ...]
    fetched: tuple[int, ...]


class Roster:
    """All that have joined. A member is present while it watches and for `away_after_s` after it was last heard of.

    Devices that have not joined `join_wait_s` after the start are not expected any more. With a `shared_edge_adapter` all
    devices have the rank of the LoRA settings, and there is one edge server. `clock` gives seconds that never go back. A run
    that resumes gives the `earlier` adapter's layout and its `folder`.
    """

    def __init__(
        self,
        expected: int,
        away_after_s: float,
        join_wait_s: float,
        clock: Callable[[], float],
        earlier: AdapterLayout | None = None,
        folder: str = "",
        shared_edge_adapter: bool = False,
    ) -> None:
        self._shared_edge_adapter = shared_edge_adapter
        self._expected = expected
        self._away_after_s = away_after_s
        self._clock = clock
        self._join_wait_s = join_wait_s
        self._join_until = clock() + join_wait_s
        self._entries: dict[str, _Entry] = {}
        self._gathered = False
        self._earlier = earlier
        self._source = f"the adapter of an earlier run in {folder}"

    def _common(self, name: str) -> Common | None:
        """What `name` must have in common with another member, or with itself before where there is no other."""
        if self._earlier is not None:
            return Common(self._source, self._earlier.task, self._earlier.model_fingerprint, self._earlier.lora)
        first = _but(name, [entry.member for entry in self._entries.values()])
        return None if first is None else Common(_source(first, name), first.task, first.model_fingerprint, first.lora)

    def _prompts(self, name: str) -> Prompts | None:
        if self._earlier is not None:
            return Prompts(self._source, self._earlier.columns, self._earlier.max_length)
        first = _but(name, self.devices())
        return None if first is None else Prompts(_source(first, name), first.columns, first.max_length)

    def check(self, member: Member, anew: bool = False) -> None:
        """Raise `RefusedError` unless `member` can take part, or, if `anew`, can be the first device of another run.

        Changes nothing.
        """
        if not member.name:
            raise RefusedError("a member must have a name")
        known = self._entries.get(member.name)
        if anew and known is not None and known.member.role == "device":
            known = None
        if known is not None and known.member != member and self._present(known) and not known.returns:
            raise NameTakenError(
                f"{member.describe()} cannot join: {known.member.describe()} has that name, with other settings or data,"
                f" and is there; give each its own name, or wait {self._away_after_s:g} s after it has gone"
            )
        common = self._common(member.name)
        if common is not None:
            common.require(member)
        if member.cut < 1:
            raise RefusedError(f"{member.describe()} cannot join: the least cut is 1")
        if member.role == "device":
            self._check_device(member, [] if anew else [other.name for other in self.devices() if other.name != member.name])
        elif self._shared_edge_adapter:
            self._check_only_edge(member)

    def _check_only_edge(self, member: Member) -> None:
        edges = (entry for entry in self._entries.values() if entry.member.role == "edge" and self._present(entry))
        for other in edges:
            if other.member.name != member.name and not other.returns:
                raise TrainingDiffersError(
                    f"{member.describe()} cannot join: {other.member.describe()} is there, and the federation server's strategy"
                    " has one adapter at the edge for all devices, which two edge servers cannot share; connect all devices to"
                    " that one, or choose another strategy"
                )

    def _check_device(self, member: Member, others: Sequence[str]) -> None:
        if len(others) >= self._expected:
            raise FullError(
                f"{member.describe()} cannot join: the {self._expected} expected devices are {', '.join(others)};"
                " raise `devices` in the federation server's settings, or give it another `out` to start anew"
            )
        self._check_rank(member)
        if member.examples < 1:
            raise RefusedError(f"{member.describe()} cannot join: it has no training examples")
        if member.examples > MOST_EXAMPLES:
            raise RefusedError(f"{member.describe()} cannot join: no device has {member.examples} training examples")
        if member.label_counts and (len(member.label_counts), sum(member.label_counts)) != (len(member.labels), member.examples):
            raise RefusedError(
                f"{member.describe()} cannot join: its {len(member.label_counts)} label counts add up to"
                f" {sum(member.label_counts)}, and it has {len(member.labels)} labels and {member.examples} training examples"
            )
        prompts = self._prompts(member.name)
        if prompts is not None:
            prompts.require(member)

    def _check_rank(self, member: Member) -> None:
        if member.own_rank > member.lora.rank:
            raise TrainingDiffersError(
                f"{member.describe()} cannot join: its rank {member.rank} is above the {member.lora.rank} of the LoRA settings;"
                " `lora.rank` is the largest rank of all devices, raise it everywhere or lower this device's `rank`"
            )
        if member.own_rank != member.lora.rank and self._shared_edge_adapter:
            raise TrainingDiffersError(
                f"{member.describe()} cannot join: it has rank {member.rank} and the others {member.lora.rank}, and the"
                " federation server's strategy needs one rank; leave the device's `rank` out or choose another there"
            )

    def add(self, member: Member) -> Member | None:
        """Take `member`, already checked, or take it back; what was known under its name before, if that differs."""
        known = self._entries.get(member.name)
        if known is None:
            self._entries[member.name] = _Entry(member, self._clock(), edges=_recent((), member.edge))
            return None
        known.edges = _recent(known.edges, member.edge)
        before, known.member = known.member, member
        known.seen, known.trained, known.left, known.returns = self._clock(), False, False, False
        return before if before != member else None

    def attendance(self) -> list[Attendance]:
        """All members in the order in which they joined, as `restore` takes them."""
        return [
            Attendance(entry.member, entry.trained, entry.left, entry.edges, tuple(sorted(entry.fetched)))
            for entry in self._entries.values()
        ]

    def restore(self, attendance: Iterable[Attendance], gathered: bool, join_left_s: float, newest: int | None) -> None:
        """Go on with the members of an earlier server. They count as just heard of: those that are no more will be away.

        They had `gathered` there, or devices yet to join are expected for `join_left_s` seconds more. Each may have fetched the
        `newest` version since this was kept.
        """
        since = set[int]() if newest is None else {newest}
        for kept in attendance:
            edges = _recent(kept.edges, kept.member.edge)
            entry = _Entry(kept.member, self._clock(), trained=kept.trained, left=kept.left, edges=edges)
            entry.returns = not kept.left
            entry.fetched = {*kept.fetched, *since}
            self._entries[kept.member.name] = entry
        self._gathered = gathered
        self._join_until = self._clock() + join_left_s

    def forget_devices(self) -> None:
        """Another run begins: all devices are yet to join."""
        for device in self.devices():
            del self._entries[device.name]
        self._gathered = False
        self._join_until = self._clock() + self._join_wait_s

    def join_left_s(self) -> float:
        """Seconds in which devices yet to join are expected."""
        return max(0.0, self._join_until - self._clock())

    def edges(self) -> list[str]:
        """The edge servers that are there."""
        entries = self._entries.values()
        return [entry.member.name for entry in entries if entry.member.role == "edge" and self._present(entry)]

    def forget_away(self) -> list[Member]:
        """Forget the members that are not there: their names, and what the others had to have in common with them."""
        away = [entry.member for entry in self._entries.values() if not self._present(entry)]
        for member in away:
            del self._entries[member.name]
        self._gathered = self._gathered and not away
        return away

    def knows(self, name: str) -> bool:
        """Whether a member of that name has joined."""
        return name in self._entries

    def get(self, name: str) -> Member:
        """The member of that name. Raises `UnknownMemberError` when none has joined."""
        return self._entry(name).member

    def device(self, name: str) -> Member:
        """The device of that name. Raises `UnknownMemberError`, or `RefusedError` when it is an edge server."""
        member = self.get(name)
        if member.role != "device":
            raise RefusedError(f"'{name}' is an edge server, not a device")
        return member

    def serves(self, device: str, edge: str) -> bool | None:
        """Whether `device` has a session with the edge server `edge`, or had the one before there; None where it has not said."""
        entry = self._entries.get(device)
        return edge in entry.edges if entry is not None and entry.edges else None

    def devices(self) -> list[Member]:
        """All devices that have joined, also those that are away or have left."""
        return [entry.member for entry in self._entries.values() if entry.member.role == "device"]

    def examples(self, pooled: AbstractSet[str]) -> int:
        """Training examples of all devices that are present, have left or are among `pooled`: not of those that died.

        Those that are expected to join yet count as the others do on average, or the first one would be thought to be all.
        """
        devices = ((name, entry) for name, entry in self._entries.items() if entry.member.role == "device")
        counted = [entry.member.examples for name, entry in devices if entry.left or name in pooled or self._present(entry)]
        return sum(counted) + (round(self.missing() * sum(counted) / len(counted)) if counted else 0)

    def missing(self) -> int:
        """Number of devices that are expected to join yet: none once the time for it is over."""
        return 0 if self._clock() > self._join_until else max(0, self._expected - len(self.devices()))

    def gather(self) -> bool:
        """Note it if no device is expected to join any more; whether that was not so before."""
        before, self._gathered = self._gathered, self._gathered or not self.missing()
        return self._gathered and not before

    @property
    def has_gathered(self) -> bool:
        """Whether there was a time at which all devices had joined, or the time for it was over."""
        return self._gathered

    def gathered(self) -> list[Member]:
        """All devices that have joined, once they have gathered; until then none."""
        return self.devices() if self._gathered else []

    def heard(self, name: str) -> None:
        """Note that `name` is alive."""
        self._hear(self._entry(name))

    def fetched(self, name: str, version: int) -> None:
        """Note that `name` has fetched a version."""
        self._entry(name).fetched = {version}

    def in_training(self) -> set[int]:
        """The versions that devices have fetched last, but for those that are done. Who died may come back."""
        entries = (entry for entry in self._entries.values() if entry.member.role == "device" and not entry.left)
        return {version for entry in entries for version in entry.fetched}

    def watch_begins(self, name: str) -> None:
        entry = self._entry(name)
        entry.watches += 1
        self._hear(entry)

    def watch_ends(self, name: str) -> None:
        entry = self._entry(name)
        entry.watches -= 1
        self._hear(entry)

    def _hear(self, entry: _Entry) -> None:
        entry.seen, entry.returns = self._clock(), False

    def trained(self, name: str) -> None:
        """Note that a device has done all its steps and will submit nothing new. Raises as `device` does."""
        self.device(name)
        self._entry(name).trained = True

    def leave(self, name: str) -> None:
        """Note that a device is done. Raises as `device` does."""
        self.device(name)
        log.info("device '%s' is done", name)
        self._entry(name).left = True

    def present_devices(self) -> dict[str, int]:
        """Devices that are there and have not left, with their training examples."""
        entries = (entry for entry in self._entries.values() if entry.member.role == "device" and self._present(entry))
        return {entry.member.name: entry.member.examples for entry in entries}

    def counted_devices(self, heard: Container[str]) -> dict[str, int]:
        """Those of them that a quorum counts: all but those that have done their steps, unless an update of theirs, or half of
        one, is there, as it is of the devices named by `heard`."""
        present = self.present_devices()
        return {name: count for name, count in present.items() if name in heard or not self._entries[name].trained}

    def presences(self) -> list[Presence]:
        """All that have joined, and who of them is there."""
        now = self._clock()
        return [
            Presence(
                entry.member,
                "left" if entry.left else "present" if self._present(entry) else "away",
                0.0 if entry.watches else now - entry.seen,
            )
            for entry in list(self._entries.values())  # as threads that watch ask, too
        ]

    def all_done(self) -> bool:
        """Whether at least one device has left and no other one is present or expected to join yet."""
        left = any(entry.left for entry in self._entries.values())
        return left and not self.missing() and not self.present_devices()

    def _present(self, entry: _Entry) -> bool:
        return not entry.left and (entry.watches > 0 or self._clock() - entry.seen <= self._away_after_s)

    def _entry(self, name: str) -> _Entry:
        entry = self._entries.get(name)
        if entry is None:
            raise UnknownMemberError(f"'{name}' has not joined this federation (any more): join again")
        return entry


def _recent(edges: tuple[str, ...], edge: str) -> tuple[str, ...]:
    """With `edge`, unless it is empty, as the newest; no more than are remembered."""
    return (*(each for each in edges if each != edge), *([edge] if edge else []))[-_EDGES:]


def _but(name: str, members: Sequence[Member]) -> Member | None:
    """The first of `members` that has another name, else the first."""
    return next((member for member in members if member.name != name), next(iter(members), None))


def _source(first: Member, name: str) -> str:
    return first.describe() if first.name != name else "the one that joined under this name before"
