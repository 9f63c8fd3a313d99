"""Who takes part: what the members must have in common, and who of them is there."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from sfl.adapters.layout import AdapterLayout, LoraSpec
from sfl.errors import RefusedError
from sfl.telemetry import log

Role = Literal["device", "edge"]

MOST_EXAMPLES = 10**12  # that are believed


class UnknownMemberError(RefusedError):
    """Someone acts who has not joined, perhaps because the server was started anew: joining (again) helps."""


@dataclass(frozen=True)
class Member:
    """A device or an edge server, as it joins; what follows `cut` is said by devices only. See federation.proto."""

    name: str
    role: Role
    task: str
    base_model: str
    model_fingerprint: str
    lora: LoraSpec
    cut: int = 0
    examples: int = 0
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    max_length: int = 0
    rank: int = 0  # of its LoRA factors; 0: that of `lora`
    label_counts: tuple[int, ...] = ()  # training examples with each of `labels`; none where it does not say

    @property
    def own_rank(self) -> int:
        """The rank of its LoRA factors."""
        return self.rank or self.lora.rank

    def describe(self) -> str:
        return f"edge server '{self.name}'" if self.role == "edge" else f"device '{self.name}' (cut {self.cut})"


@dataclass(frozen=True)
class Common:
    """What all members must have in common, and where it comes from: the first member or an earlier run's adapter."""

    source: str
    task: str
    model_fingerprint: str
    lora: LoraSpec

    def require(self, member: Member) -> None:
        """Raise `RefusedError` naming the first difference with both values."""
        who = member.describe()
        if member.task != self.task:
            raise RefusedError(f"{who} has task '{member.task}', {self.source} has '{self.task}'")
        if member.model_fingerprint != self.model_fingerprint:
            raise RefusedError(
                f"{who} has another base model than {self.source}: fingerprint {member.model_fingerprint}"
                f" against {self.model_fingerprint}; give both the same model files"
            )
        difference = member.lora.difference(self.lora)
        if difference is not None:
            raise RefusedError(f"{who} has other LoRA settings than {self.source}: {difference}")


@dataclass(frozen=True)
class Prompts:
    """How devices make texts, the same for all, and where it comes from."""

    source: str
    columns: tuple[str, ...]
    max_length: int

    def require(self, member: Member) -> None:
        """Raise `RefusedError` naming the difference with both values."""
        for what, mine, theirs in (
            ("columns", member.columns, self.columns),
            ("max_length", member.max_length, self.max_length),
        ):
            if mine != theirs:
                raise RefusedError(f"{member.describe()} has {what} {_show(mine)}, {self.source} has {_show(theirs)}")


@dataclass
class _Entry:
    member: Member
    seen: float  # clock's seconds
    watches: int = 0
    left: bool = False
    fetched: int | None = None  # the last version, which a device trains on


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
        self._join_until = clock() + join_wait_s
        self._entries: dict[str, _Entry] = {}
        self._earlier = earlier
        self._source = f"the adapter of an earlier run in {folder}"

    def _common(self) -> Common | None:
        if self._earlier is not None:
            return Common(self._source, self._earlier.task, self._earlier.model_fingerprint, self._earlier.lora)
        for entry in self._entries.values():
            first = entry.member
            return Common(first.describe(), first.task, first.model_fingerprint, first.lora)
        return None

    def _prompts(self) -> Prompts | None:
        if self._earlier is not None:
            return Prompts(self._source, self._earlier.columns, self._earlier.max_length)
        for first in self.devices():
            return Prompts(first.describe(), first.columns, first.max_length)
        return None

    def check(self, member: Member) -> None:
        """Raise `RefusedError` unless `member` can take part; changes nothing."""
        if not member.name:
            raise RefusedError("a member must have a name")
        known = self._entries.get(member.name)
        if known is not None and known.member != member and self._present(known):
            raise RefusedError(
                f"{member.describe()} cannot join: {known.member.describe()} has that name, with other settings or data,"
                f" and is there; give each its own name, or wait {self._away_after_s:g} s after it has gone"
            )
        common = self._common()
        if common is not None:
            common.require(member)
        if member.cut < 1:
            raise RefusedError(f"{member.describe()} cannot join: the least cut is 1")
        if member.role == "device":
            self._check_device(member)
        elif self._shared_edge_adapter:
            self._check_only_edge(member)

    def _check_only_edge(self, member: Member) -> None:
        edges = (entry for entry in self._entries.values() if entry.member.role == "edge" and self._present(entry))
        for other in edges:
            if other.member.name != member.name:
                raise RefusedError(
                    f"{member.describe()} cannot join: {other.member.describe()} is there, and the federation server's strategy"
                    " has one adapter at the edge for all devices, which two edge servers cannot share; connect all devices to"
                    " that one, or choose another strategy"
                )

    def _check_device(self, member: Member) -> None:
        others = [device.name for device in self.devices() if device.name != member.name]
        if len(others) >= self._expected:
            raise RefusedError(
                f"{member.describe()} cannot join: the {self._expected} expected devices are {', '.join(others)};"
                " raise `devices` in the federation server's settings"
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
        prompts = self._prompts()
        if prompts is not None:
            prompts.require(member)

    def _check_rank(self, member: Member) -> None:
        if member.own_rank > member.lora.rank:
            raise RefusedError(
                f"{member.describe()} cannot join: its rank {member.rank} is above the {member.lora.rank} of the LoRA settings;"
                " `lora.rank` is the largest rank of all devices, raise it everywhere or lower this device's `rank`"
            )
        if member.own_rank != member.lora.rank and self._shared_edge_adapter:
            raise RefusedError(
                f"{member.describe()} cannot join: it has rank {member.rank} and the others {member.lora.rank}, and the"
                " federation server's strategy needs one rank; leave the device's `rank` out or choose another there"
            )

    def add(self, member: Member) -> Member | None:
        """Take `member`, already checked, or take it back; what was known under its name before, if that differs."""
        known = self._entries.get(member.name)
        if known is None:
            self._entries[member.name] = _Entry(member, self._clock())
            return None
        before, known.member = known.member, member
        known.seen, known.left = self._clock(), False
        return before if before != member else None

    def forget_away(self) -> list[Member]:
        """Forget the members that are not there: their names, and what the others had to have in common with them."""
        away = [entry.member for entry in self._entries.values() if not self._present(entry)]
        for member in away:
            del self._entries[member.name]
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

    def gathered(self) -> list[Member]:
        """All devices that have joined; none while some are expected yet."""
        return [] if self.missing() else self.devices()

    def heard(self, name: str) -> None:
        """Note that `name` is alive."""
        self._entry(name).seen = self._clock()

    def fetched(self, name: str, version: int) -> None:
        """Note that `name` has fetched a version."""
        self._entry(name).fetched = version

    def in_training(self) -> set[int]:
        """The versions that devices have fetched last, but for those that are done. Who died may come back."""
        entries = (entry for entry in self._entries.values() if entry.member.role == "device" and not entry.left)
        return {entry.fetched for entry in entries if entry.fetched is not None}

    def watch_begins(self, name: str) -> None:
        entry = self._entry(name)
        entry.watches, entry.seen = entry.watches + 1, self._clock()

    def watch_ends(self, name: str) -> None:
        entry = self._entry(name)
        entry.watches, entry.seen = entry.watches - 1, self._clock()

    def leave(self, name: str) -> None:
        """Note that a device is done. Raises as `device` does."""
        self.device(name)
        log.info("device '%s' is done", name)
        self._entry(name).left = True

    def present_devices(self) -> dict[str, int]:
        """Devices that are there and not done, the ones that a quorum counts, with their training examples."""
        entries = (entry for entry in self._entries.values() if entry.member.role == "device" and self._present(entry))
        return {entry.member.name: entry.member.examples for entry in entries}

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


def _show(value: tuple[str, ...] | int) -> str:
    return str(value) if isinstance(value, int) else ", ".join(value) or "none"
