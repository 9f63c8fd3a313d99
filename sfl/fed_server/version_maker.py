"""From the pool to a published version: when it is due, of whose updates, and what is told of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterState
from sfl.errors import AdapterError, StateError
from sfl.fed_server import contents, server_state
from sfl.fed_server.aggregation import Aggregated, Aggregation
from sfl.fed_server.contents import Contents, Entry
from sfl.fed_server.ledger import Ledger
from sfl.fed_server.pool import Pool, Pooled, Submission
from sfl.fed_server.reach import Reach
from sfl.fed_server.roster import Roster
from sfl.fed_server.roster_file import RosterFile
from sfl.fed_server.strategies import Standing
from sfl.fed_server.updates import Update
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter, counted, log

_VIEWS_KEPT = 4  # of old versions, while an aggregation looks at what its updates stem from

Refuse = Callable[[str, None, str], None]  # device, submission, reason


class VersionMaker:
    """Aggregates `pool` and publishes what comes of it in `store`, as versions of the federation with the id `federation`.

    `ledger` is told what went into each, and what was in one that is removed, `refuse` of each update that was not used. Who
    trains on which version is kept in `roster_file` before the next one is there: a server that is started anew must not remove
    those.
    """

    def __init__(
        self,
        settings: FedSettings,
        aggregation: Aggregation,
        pool: Pool,
        roster: Roster,
        reach: Reach | None,
        store: VersionStore,
        metrics: MetricsWriter,
        refuse: Refuse,
        ledger: Ledger,
        roster_file: RosterFile,
        federation: str,
    ) -> None:
        newest = store.newest()
        self.made = 0 if newest is None else newest.number  # versions, those of earlier servers included
        self._ledger = ledger
        self._roster_file = roster_file
        self._federation = federation
        self._settings = settings
        self._aggregation = aggregation
        self._pool = pool
        self._roster = roster
        self._reach = reach
        self._store = store
        self._metrics = metrics
        self._refuse = refuse
        self._told_too_few = False
        self._told_no_quorum = False  # of this pool
        self.held_up = ""  # why no version can be made of the pool, and what to do; empty where nothing is in the way

    def view(self, version: int, rank: int) -> AdapterState:
        """A version as a device of `rank` gets it. Raises `AdapterError` for a version or a rank that is not there."""
        return self._aggregation.view(self._store.load(version), version, rank)

    def make_if_due(self) -> bool:
        """Make a version when the strategy says so; while all devices are away, wait for one that comes back or for the end.

        Whether one was published.
        """
        pooled, present = self.pooled(), self._present()
        if not pooled or not present:
            return False
        unreachable = self._reach.unreachable(present) if self._reach is not None else set[str]()
        standing = Standing(pooled, present, self._roster.missing(), self._pool.waited_s(), unreachable)
        if not self._aggregation.strategy.due(standing):
            self._tell_no_quorum(standing)
            return False
        return not self._waits_for_more(standing) and self.make()

    def lacks_devices(self) -> bool:
        """Whether an update of everybody who is there would not do, and would if nobody else were expected to join yet."""
        present, missing, waited_s = self._present(), self._roster.missing(), self._pool.waited_s()
        pooled = {**dict.fromkeys(present, 1), **self.pooled()}
        now, otherwise = Standing(pooled, present, missing, waited_s), Standing(pooled, present, 0, waited_s)
        due = self._aggregation.strategy.due
        return missing > 0 and due(otherwise) and not due(now)

    def _present(self) -> dict[str, int]:
        """The devices that a quorum counts, with their training examples."""
        return self._roster.counted_devices(self.pooled().keys() | {device for device, _ in self._pool.halves()})

    def pooled(self) -> dict[str, int]:
        """Submissions in the pool, by device, of devices that have joined: a server that has lost its roster waits for them."""
        return {device: count for device, count in self._pool.counts().items() if self._roster.knows(device)}

    def _tell_no_quorum(self, standing: Standing) -> None:
        """Say once of a pool that it has waited longer than `round_timeout_s`, and for whom."""
        if self._told_no_quorum or standing.waited_s < self._settings.strategy.round_timeout_s:
            return
        self._told_no_quorum = True
        missing = sorted(standing.present.keys() - standing.pooled.keys())
        self._metrics.write("no_quorum", waited_s=round(standing.waited_s, 1), missing=missing, yet_to_join=standing.missing)
        log.warning(
            "the updates of %s have waited %.0f s for others: nothing has come from %s, and %d devices have yet to join",
            ", ".join(sorted(standing.pooled)),
            standing.waited_s,
            ", ".join(missing) or "nobody else",
            standing.missing,
        )

    def _waits_for_more(self, standing: Standing) -> bool:
        """Whether the robust rule needs more updates than are pooled, there are devices that could give them, and it is not
        longer than `round_timeout_s` that the pool has waited."""
        least = self._aggregation.least
        could = len(standing.pooled.keys() | standing.present.keys()) + standing.missing
        if len(standing.pooled) >= least:
            self._told_too_few = False
            return False
        in_time = standing.waited_s < self._settings.strategy.round_timeout_s
        waits = self._settings.robust.too_few == "wait" and could >= least and in_time
        if not self._told_too_few:
            self._told_too_few = True
            outcome = "waiting for more" if waits else "these are refused, and so are others until more devices take part"
            log.warning("%s, and the pool has %d: %s", self._aggregation.why, len(standing.pooled), outcome)
        return waits

    def make(self) -> bool:
        """Make a version of the pool. When no update could be used, one is published if the strategy has devices wait for it.

        False when it cannot be made now, because the disk is full or too many files are open, say; the pool stays then, for the
        next time.
        """
        newest = self._store.newest()
        if newest is None:
            return False
        started = time.perf_counter()
        taken = self._pool.take(mix_versions=self._aggregation.merge.additive)
        taken = [pooled for pooled in taken if self._roster.knows(pooled.first.device)]
        updates = self._updates(taken, newest.number)
        try:
            population = self._roster.examples({update.device for update in updates})
            done = self._aggregation.aggregate(newest.state, updates, population)
        except OSError as error:  # says nothing of the updates, which are on disk
            return self._later(error)
        except AdapterError as error:  # would come again at every tick
            log.error("the updates of %s are lost: %s", ", ".join(update.device for update in updates), error)
            lost = {update.device: str(error) for update in updates}
            done = Aggregated(newest.state, self._aggregation.server_state, rejected=lost)
        if not done.weights and not self._aggregation.strategy.waits:
            for submission in (each for pooled in taken for each in pooled.submissions):
                self._ledger.dropped(submission, _reason(submission, done))
            self._pool.remove(taken)
            self.held_up = ""
            self._tell_refused(newest.number + 1, done)
            return True
        self._roster_file.keep(finished=False)
        try:
            extras = server_state.files(done, self._settings.strategy.name)
            held = self._contents(taken, done)
            self._store.publish(newest.number + 1, done.state, newest.layout, {**extras, **held.files()})
        except (AdapterWriteError, OSError) as error:
            return self._later(error)
        self.held_up = ""
        self._ledger.published(newest.number + 1, held)
        self._pool.remove(taken)
        self._aggregation.keep(done)
        self.made += 1
        self._told_no_quorum = False
        self._tell(newest.number + 1, updates, done, time.perf_counter() - started)
        self._remove_superseded()
        return True

    def _later(self, error: Exception) -> bool:
        """Say that no version can be made, why, and what to do; once, as long as it is the same."""
        told = self.held_up
        self.held_up = (
            f"no version can be made of the pool: {error}; it is tried again every second; make room, or mend what that names"
        )
        if self.held_up != told:
            log.error("%s", self.held_up)
        return False

    def _remove_superseded(self) -> None:
        """Delete the versions that are not to be kept and that nobody needs any more."""
        needed = self._roster.in_training() | self._pool.versions()
        try:
            for number in self._store.superseded(self._settings.keep_versions, needed):
                server_state.hand_over(self._store, number)
                self._ledger.removed(number, contents.load(self._store.folder, number))
                self._store.remove(number)
        except (AdapterWriteError, StateError, OSError) as error:  # tried again with the next version
            log.warning("%s", error)

    def _updates(self, taken: list[Pooled], newest: int) -> list[Update]:
        view = lru_cache(maxsize=_VIEWS_KEPT)(self.view)

        def update(pooled: Pooled) -> Update:
            first = pooled.first
            version = min(submission.version for submission in pooled.submissions)
            return Update(
                device=first.device,
                version=version,
                examples=self._roster.get(first.device).examples,  # what it has now, not when it submitted
                submissions=pooled.ever,
                pooled=len(pooled.submissions),
                trained_on=sum(submission.trained_on for submission in pooled.submissions),
                steps=sum(submission.steps for submission in pooled.submissions),
                rank=first.rank,
                cut=first.cut,
                lag=newest - version,
                read=pooled.read,
                base=lambda: view(version, first.rank),
            )

        return [update(pooled) for pooled in taken]

    def _contents(self, taken: list[Pooled], done: Aggregated) -> Contents:
        """What goes into the version, with each device's weight."""

        def entry(submission: Submission) -> Entry:
            about = submission.submission, submission.version, submission.trained_on, submission.steps
            if submission.device in done.weights:
                return Entry(submission.device, *about, weight=float(done.weights[submission.device]))
            return Entry(submission.device, *about, refused=_reason(submission, done))

        return Contents(self._federation, tuple(entry(submission) for pooled in taken for submission in pooled.submissions))

    def _tell_refused(self, version: int, done: Aggregated) -> None:
        for device, reason in done.rejected.items():
            log.warning("the update of device '%s' is not in version %d: %s", device, version, reason)
            self._refuse(device, None, reason)

    def _tell(self, version: int, updates: list[Update], done: Aggregated, wall_s: float) -> None:
        self._tell_refused(version, done)
        used = [update for update in updates if update.device in done.weights]
        submissions = sum(update.pooled for update in used)
        epsilons = self._aggregation.epsilons()
        self._metrics.write(
            "aggregate",
            version=version,
            devices=done.weights,
            lags={update.device: update.lag for update in used},
            submissions=submissions,
            steps={update.device: update.steps for update in used},
            trained_on={update.device: update.trained_on for update in used},
            wall_s=round(wall_s, 4),
            **done.notes,
            **({"epsilon": epsilons} if epsilons else {}),
        )
        devices = ", ".join(sorted(update.device for update in used))
        made_from = counted(submissions, "submission", "submissions")
        log.info("version %d from %s of %s", version, made_from, devices or "no device, unchanged")


def _reason(submission: Submission, done: Aggregated) -> str:
    """Why a submission has no part in a version."""
    return done.rejected.get(submission.device, "it was not used")
