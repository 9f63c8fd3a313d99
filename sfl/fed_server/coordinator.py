"""The federation as a state machine: members join, agree, submit and leave; updates become versions."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from sfl.adapters.state import AdapterState, byte_size, device_half, edge_half
from sfl.errors import AdapterError, FinishedError, RefusedError, SflError, StateDiffersError, UnknownMemberError
from sfl.fed_server import server_state
from sfl.fed_server.advice import advice
from sfl.fed_server.aggregation import Aggregation
from sfl.fed_server.agreement import Agreement
from sfl.fed_server.contents import Contents
from sfl.fed_server.intake import Intake
from sfl.fed_server.ledger import Ledger
from sfl.fed_server.members import Member
from sfl.fed_server.placement import Placement
from sfl.fed_server.pool import Half, Pool
from sfl.fed_server.reach import Reach
from sfl.fed_server.recovery import settle_accounts, take_stock, tell_resumed
from sfl.fed_server.roster import Presence, Roster
from sfl.fed_server.roster_file import RosterFile
from sfl.fed_server.strategies import make_strategy
from sfl.fed_server.terms import Terms
from sfl.fed_server.version_maker import VersionMaker
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter, log
from sfl.v1 import federation_pb2 as pb


class Federation:
    """All that the federation server decides. No gRPC, no asyncio: one thread calls it, and `tick` once a second.

    `on_change` is called when something has changed that watchers should hear: `agreement`, `policy`, `version`,
    `finished`, `failure`, or the number of joined devices. `clock` gives seconds that never go back.

    What must outlive the process is in `out`: the pool of updates, the ledger and the roster. With the versions they are all that
    a server needs to go on where another one was killed; nothing is acknowledged before the disk has it. Without `out` updates
    wait in a temporary folder. `id` is the same for all servers that go on with the same federation.

    Raises `SettingsError` for labels that cannot be, or are not those of the versions that the store resumes from, and for a
    robust rule that the expected devices are too few for; `StateError` when what is in `out` is damaged, in use, or another
    federation's; `AdapterWriteError` or `StateWriteError` when it cannot be written.
    """

    def __init__(
        self,
        settings: FedSettings,
        store: VersionStore,
        metrics: MetricsWriter,
        clock: Callable[[], float] = time.monotonic,
        out: Path | None = None,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self._settings = settings
        self._store = store
        self._metrics = metrics
        newest = store.newest()
        earlier = None
        if newest is not None:
            earlier = server_state.load(store, newest, make_strategy(settings.strategy), settings.privacy.on)
        self._aggregation = Aggregation(settings, earlier)
        self._strategy = self._aggregation.strategy
        for line in advice(settings, self._aggregation):
            log.warning("%s", line)
        self._roster = Roster(
            settings.devices,
            settings.away_after_s,
            settings.join_wait_s,
            clock,
            earlier=None if newest is None else newest.layout,
            folder=str(store.folder),
            shared_edge_adapter=self._strategy.shared_edge_adapter,
        )
        self._terms = Terms(settings, self._roster, self._aggregation)
        if newest is not None:
            self._terms.resume(newest.layout, store.folder)
            log.info("resuming from version %d in %s; choose another `out` to start anew", newest.number, store.folder)
        self._ledger = Ledger(out)
        stock = take_stock(self._ledger, store)
        self.id, self._proposer = stock.federation, stock.proposer
        pool = None if out is None else out / "pool"
        version = -1 if newest is None else newest.number
        settled = sorted({*stock.settled(), *self._ledger.past.settled})
        self._pool = Pool(pool, settings.half_expires_s, clock, self._ledger.accepted, settled, version)
        settle_accounts(self._ledger, stock, self._pool)
        self._reach = Reach(settings.strategy.overdue, clock) if settings.strategy.reach else None
        self._intake = Intake(settings, self._aggregation, self._pool, self._roster, self._reach, store, metrics, self._ledger)
        self._roster_file = RosterFile(out, self._roster, self._reach, None if newest is None else newest.number)
        self._maker = VersionMaker(
            settings,
            self._aggregation,
            self._pool,
            self._roster,
            self._reach,
            store,
            metrics,
            self._intake.refuse,
            self._ledger,
            self._roster_file,
            self.id,
        )
        self.finished = self._ended = self._roster_file.finished  # an earlier server's run: the first device begins another one
        if tell_resumed(self._pool, self._roster_file.restored, self.version, metrics):
            self._terms.agree()
        self._terms.gather()

    def close(self) -> None:
        """Write what there was no room for, if there is now, and let another server have `out`."""
        if self._roster_file.behind:
            self._roster_file.keep(self.finished)
        self._ledger.close()

    @property
    def agreement(self) -> Agreement | None:
        """What all devices have in common, None before they have agreed."""
        return self._terms.agreement

    @property
    def failure(self) -> SflError | None:
        """Why no agreement will ever be reached."""
        return self._terms.failure

    @property
    def version(self) -> int | None:
        """The newest version, None before the first."""
        newest = self._store.newest()
        return None if newest is None else newest.number

    @property
    def joined(self) -> int:
        """Number of devices that have joined."""
        return len(self._roster.devices())

    @property
    def expected(self) -> int:
        """Number of devices that are to join."""
        return self._settings.devices

    @property
    def aggregations(self) -> int:
        """Versions that were made of updates."""
        return self._maker.made

    @property
    def submissions(self) -> int:
        """Whole submissions so far."""
        return self._pool.submissions()

    @property
    def refused(self) -> int:
        """Updates that were not used."""
        return self._intake.refused

    @property
    def held_up(self) -> str:
        """Why no version can be made of the pool now, and what to do; empty where nothing is in the way."""
        return self._maker.held_up

    @property
    def lacks_devices(self) -> bool:
        """Whether there will be no new version before more devices have joined, or the time for that is over."""
        return self._maker.lacks_devices()

    @property
    def adapter_bytes(self) -> int:
        """Size of the global adapter in bytes, 0 before version 0."""
        newest = self._store.newest()
        return 0 if newest is None else byte_size(newest.state)

    def epsilons(self) -> dict[str, float]:
        """The epsilon that each device has spent so far under differential privacy, else nothing; the run's is the largest."""
        return self._aggregation.epsilons()

    def policy(self, name: str) -> pb.UploadPolicy:
        """When the member `name` uploads, and how it trains. Raises `UnknownMemberError`."""
        return self._terms.policy(name)

    # Joining

    def check(self, member: Member) -> None:
        """Raise `RefusedError` naming what does not fit, with both values, where `join` would; changes nothing."""
        if self.failure is not None:
            raise self.failure
        if self.finished and not self._ended and member.role == "device":
            raise FinishedError(f"{member.describe()} cannot join: the federation has finished; start its server again")
        self._roster.check(member, anew=self._ended)
        self._terms.check(member)

    def join(self, member: Member) -> None:
        """Take `member` in, or back. Raises as `check` does."""
        self.check(member)
        if self._ended and member.role == "device":
            self._begin_anew()
        known = self._roster.knows(member.name)
        before = self._roster.add(member)
        if before is not None and (before.cut, before.own_rank) != (member.cut, member.own_rank):
            self._log_expired(self._pool.drop(member.name))  # they are halves at the old cut and rank
        if self._reach is not None:
            self._reach.forget(member.name)
        if not known:
            log.info("%s has joined (%d of %d devices are here)", member.describe(), self.joined, self._settings.devices)
            self._metrics.write("join", name=member.name, role=member.role)
        self._terms.agree()
        self._terms.gather()
        self._roster_file.keep(self.finished)
        self.on_change()

    def _begin_anew(self) -> None:
        """Begin another run from the last version of one that an earlier server has finished."""
        self.finished = self._ended = False
        self._roster.forget_devices()
        log.info("the earlier run had finished: another one begins with version %s", self.version)

    # Versions

    def proposed(self, edge: str) -> bool | None:
        """What `propose` answers whatever is proposed; None while there is no version 0.

        Raises `RefusedError` before the agreement, and for anyone but an edge server.
        """
        member = self._roster.get(edge)
        if member.role != "edge":
            raise RefusedError(f"{member.describe()} cannot propose version 0: edge servers do")
        self._roster.heard(edge)
        if self.version is not None:
            return edge == self._proposer
        if self.agreement is None:
            raise RefusedError(f"{member.describe()} proposed version 0 before the devices had agreed on their labels")
        return None

    def propose(self, edge: str, placement: Placement, state: AdapterState) -> bool:
        """Take `state` as version 0 if it is the first proposal; whether `edge`'s proposal is version 0.

        Raises `RefusedError` as `proposed` does, `AdapterError` when the state does not fit the placement and the LoRA settings.
        """
        if (answer := self.proposed(edge)) is not None or self.agreement is None:
            return bool(answer)
        member = self._roster.get(edge)
        held = Contents(self.id, edge=edge)
        self._store.publish(0, state, placement.layout(member, self.agreement), held.files())
        self._proposer = edge
        self._ledger.published(0, held)
        log.info("version 0 comes from %s: %d tensors, %.1f MB", member.describe(), len(state), byte_size(state) / 1e6)
        self.on_change()
        return True

    def fetch(self, name: str, version: int, first_layer: int = 0, last_layer: int = 0, rank: int = 0) -> AdapterState:
        """The tensors of `version` in layers `first_layer` to `last_layer` - 1; to the end, with the head, for 0.

        They are as a device of `rank` gets them, 0 being that of the LoRA settings. Raises `RefusedError` for a version or
        a rank that is not there, and for layers below the lowest cut of an edge server.
        """
        member = self._roster.get(name)
        self._roster.heard(name)
        if member.role == "edge" and first_layer < member.cut:
            raise RefusedError(
                f"{member.describe()} asked for layers from {first_layer} on, but joined with {member.cut} as its lowest cut:"
                " what lies below it belongs to devices"
            )
        try:
            state = self._maker.view(version, rank or member.lora.rank)
        except AdapterError as error:
            raise RefusedError(str(error)) from error
        self._roster.fetched(name, version)
        upper = edge_half(state, first_layer)
        return device_half(upper, last_layer) if last_layer else upper

    # Updates

    def submit(self, half: Half, state: AdapterState) -> None:
        """Take one half of an update, as `Intake.take` does; the version that it makes possible is made."""
        whole = self._intake.take(half, state, self.finished)
        self._log_expired(self._pool.crowded_out(half), ", and newer ones are as many as may wait")
        if self._reach is not None and half.half == "device":
            self._roster_file.keep(self.finished)
        if whole and self._maker.make_if_due():
            self.on_change()

    def has_whole(self, half: Half) -> bool:
        """Whether the submission whose half has been submitted does not wait for its other half."""
        return (half.device, half.submission) not in self._pool.halves()

    def refuse(self, device: str | None, submission: str | None, reason: str) -> None:
        """Count an update, or what was meant to be one, that is not used; None where it is not even known whose it is."""
        self._intake.refuse(device, submission, reason)

    def serves_on(self, name: str) -> bool:
        """Whether the member `name` goes on when the federation has finished: edge servers do, for the next run."""
        return self._roster.get(name).role == "edge"

    def edges(self) -> list[str]:
        """The edge servers that are there."""
        return self._roster.edges()

    def serves(self, device: str, edge: str) -> bool | None:
        """Whether an edge server may submit halves of a device; None where that is not known yet."""
        return self._roster.serves(device, edge)

    # What there is to see

    def presences(self) -> list[Presence]:
        """All members, and who of them is there."""
        return self._roster.presences()

    def pooled(self) -> list[str]:
        """Devices that have updates in the pool."""
        return sorted(self._pool.counts())

    def submissions_by_device(self) -> dict[str, int]:
        """Whole submissions so far, by device."""
        return self._pool.ever()

    # Presence and time

    def heard(self, name: str) -> Member:
        """Note that `name` is alive; the member. Raises `UnknownMemberError` when it has not joined."""
        self._roster.heard(name)
        return self._roster.get(name)

    def require_own(self, member: Member, federation: str) -> None:
        """Raise `StateDiffersError` for a device that has trained with the versions of another federation."""
        if member.role == "device" and federation not in ("", self.id):
            raise StateDiffersError(
                f"{member.describe()} has trained with versions that this federation server does not have: it was given another"
                " folder, or its files are gone; give it those back, or start the device anew, too"
            )

    def require_id(self, federation: str) -> None:
        """Raise `UnknownMemberError` when a member has joined another federation, or none."""
        if federation and federation != self.id:
            raise UnknownMemberError("this is another federation than the one that was joined: join again")

    def watch_begins(self, name: str) -> None:
        """`name` has opened a watch. Raises `UnknownMemberError` when it has not joined."""
        self._roster.watch_begins(name)

    def watch_ends(self, name: str) -> None:
        """A watch of `name` is over."""
        self._roster.watch_ends(name)

    def trained(self, name: str) -> None:
        """A device has done its steps and submitted what came of them: rounds do not wait for it while it evaluates.

        Raises as `leave` does.
        """
        self._roster.trained(name)
        self._roster_file.write(self.finished)
        self.tick()

    def leave(self, name: str) -> None:
        """A device is done. Raises as `Roster.device` does, and `StateWriteError` when that cannot be kept: a server that is
        started anew would wait for it."""
        self._roster.leave(name)
        self._roster_file.write(self.finished)
        self.tick()

    def tick(self) -> None:
        """What time brings: halves expire, devices that went away are no longer waited for, the federation ends."""
        self._log_expired(self._pool.expire())
        self._ledger.catch_up()
        if self._roster_file.behind:
            self._roster_file.keep(self.finished)
        if self.agreement is None:
            self._forget_away()
        if self.finished:
            return
        if self._roster.gather():  # the others are not expected any more
            self._terms.gather()
            self._roster_file.keep(self.finished)
            self.on_change()
        if self._roster.all_done() and self.version is not None:
            self._finish()
        elif self._maker.make_if_due():
            self.on_change()

    def _forget_away(self) -> None:
        """Nothing rests on who has gone before the agreement; so it may come back with corrected settings, or another name."""
        forgotten = self._roster.forget_away()
        for member in forgotten:
            log.info("%s has gone and is forgotten", member.describe())
        if forgotten:
            self._terms.failure = None  # it came from the data of all who were there
            self._roster_file.keep(self.finished)
            self.on_change()

    def _finish(self) -> None:
        while self._maker.pooled() and self._strategy.final:
            if not self._maker.make():
                return  # it could not be written; the next tick tries again
            self.on_change()
        if left := self._pool.counts():
            log.info("the rest of the pool, from %s, is left out", ", ".join(sorted(left)))
            for submission in self._pool.whole():
                self._ledger.dropped(submission, "it was in the pool when the run ended, and is left out")
            self._pool.clear()
        self.finished = True
        self._ledger.finished(self.version)
        self._roster_file.keep(self.finished)
        log.info("all devices are done; version %s is the last", self.version)
        self.on_change()

    def _log_expired(self, halves: list[Half], why: str = "") -> None:
        for half in halves:
            self._metrics.write("expired", device=half.device, submission=half.submission, half=half.half)
            self._ledger.dropped(half, f"only its {half.half} half came{why}")
