"""What a federation server that is started anew finds of the one before it, and how the ledger is made to agree with that."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import NamedTuple

from sfl.errors import StateDiffersError
from sfl.fed_server import contents
from sfl.fed_server.contents import Contents
from sfl.fed_server.ledger import Key, Ledger, Past
from sfl.fed_server.pool import Pool
from sfl.fed_server.versions import VersionStore
from sfl.telemetry import MetricsWriter, log


class Stock(NamedTuple):
    """What versions hold: `federation` is the id that they share, `proposer` the edge server that version 0 is from."""

    federation: str
    proposer: str
    contents: dict[int, Contents]

    def settled(self) -> Iterator[Key]:
        """Every submission that is in a version."""
        return ((entry.device, entry.submission) for held in self.contents.values() for entry in held.submissions)


def take_stock(ledger: Ledger, store: VersionStore) -> Stock:
    """Read what all versions hold, and open a ledger that is new.

    Raises `StateDiffersError` when ledger and versions are not of one federation, `StateError` for a damaged file.
    """
    newest = store.newest()
    numbers = range(0 if newest is None else newest.number + 1)
    found = {number: held for number in numbers if (held := contents.load(store.folder, number)) is not None}
    federation = _identity(ledger.past, None if newest is None else newest.number, found, ledger.where, str(store.folder))
    if ledger.past.federation is None:
        ledger.begin(federation, None if newest is None else newest.number)
    return Stock(federation, found[0].edge if 0 in found else "", found)


def _identity(past: Past, newest: int | None, found: dict[int, Contents], where: str, adapters: str) -> str:
    fresh = uuid.uuid4().hex
    if newest is None:
        if past.accepted or past.told is not None:
            raise StateDiffersError(
                f"{where} tells of versions, and {adapters} has none: name the folder that has them with `adapters`, or give the"
                " federation server another `out` to start anew"
            )
        return past.federation or fresh
    theirs = found[newest].federation if newest in found else None  # None: an earlier release of sfl wrote it
    if past.federation is None:
        return theirs or fresh
    if theirs != past.federation and not (theirs is None and past.begun == newest):
        raise StateDiffersError(
            f"{where} is the ledger of another federation than the one whose versions are in {adapters}: give the federation"
            " server the `out` that goes with its `adapters`, or another one to begin a new ledger"
        )
    return past.federation


def settle_accounts(ledger: Ledger, stock: Stock, pool: Pool) -> None:
    """Add to the ledger what a killed server did not come to write, and what is gone of what it had accepted.

    Raises `StateWriteError` when it cannot be written.
    """
    past, ledger.past = ledger.past, Past()
    told = max(past.told if past.told is not None else -1, past.begun if past.begun is not None else -1)
    for submission in pool.whole():
        if (submission.device, submission.submission) not in past.accepted:
            ledger.accepted(submission)
    for version in sorted(number for number in stock.contents if number > told):
        ledger.published(version, stock.contents[version])
    pooled = {(submission.device, submission.submission) for submission in pool.whole()}
    for lost in sorted(past.accepted - past.dropped - past.removed - pooled - set(stock.settled()) - pool.halves()):
        log.error("submission %s of device '%s' was accepted, and its files are gone or damaged", lost[1], lost[0])
        ledger.dropped(lost, "its files are gone or damaged")


def tell_resumed(pool: Pool, members: int, version: int | None, metrics: MetricsWriter) -> bool:
    """Say what an earlier server has left, if that is more than versions; whether it is."""
    pooled, halves = len(pool.whole()), len(pool.halves())
    if not (pooled or halves or members):
        return False
    message = "going on where an earlier server ended: %d members, %d submissions and %d halves in the pool"
    log.info(message, members, pooled, halves)
    metrics.write("resume", version=version, members=members, pooled=pooled, halves=halves)
    return True
