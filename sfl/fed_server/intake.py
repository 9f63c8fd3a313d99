"""How halves of updates come in: what they are checked for before they are kept."""

from __future__ import annotations

import numpy as np

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterState, device_half, edge_half, require_same_keys
from sfl.errors import AdapterError, BusyError, FinishedError, RefusedError, SflError, StateWriteError, UnknownMemberError
from sfl.fed_server.aggregation import Aggregation
from sfl.fed_server.ledger import Ledger
from sfl.fed_server.members import Member
from sfl.fed_server.pool import Half, Pool
from sfl.fed_server.reach import Reach
from sfl.fed_server.roster import Roster
from sfl.fed_server.versions import Version, VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter, log

GREATEST = 1e6  # absolute value in an update: factors are of the order of one, and sums of squares of more may overflow


class Intake:
    """Takes halves of updates into `pool`, or refuses them, which it counts and tells `metrics`."""

    def __init__(
        self,
        settings: FedSettings,
        aggregation: Aggregation,
        pool: Pool,
        roster: Roster,
        reach: Reach | None,
        store: VersionStore,
        metrics: MetricsWriter,
        ledger: Ledger,
    ) -> None:
        self.refused = 0  # updates
        self._settings = settings
        self._aggregation = aggregation
        self._pool = pool
        self._roster = roster
        self._reach = reach
        self._store = store
        self._metrics = metrics
        self._ledger = ledger

    def take(self, half: Half, state: AdapterState, finished: bool) -> bool:
        """Take one half of an update, unless the run has `finished`; whether it makes a whole one. Nothing happens when it had
        arrived before.

        Raises `RefusedError` for a device or version that is unknown and for halves that do not belong together,
        `AdapterError` when the tensors are not exactly that half of an update at the device's cut and rank, or hold values that
        are not finite or beyond `GREATEST`, and `AdapterWriteError`, `StateWriteError` or `BusyError` when they cannot be kept;
        trying again may help then.
        """
        try:
            return self._take(half, state, finished)
        except (UnknownMemberError, BusyError, AdapterWriteError, StateWriteError):  # the sender does what helps, and tries again
            raise
        except SflError as error:
            self.refuse(half.device, half.submission, str(error))
            raise

    def refuse(self, device: str | None, submission: str | None, reason: str) -> None:
        """Count an update, or what was meant to be one, that is not used; None where it is not even known whose it is."""
        self.refused += 1
        self._metrics.write("refused", device=device, submission=submission, reason=reason)

    def _take(self, half: Half, state: AdapterState, finished: bool) -> bool:
        device = self._roster.device(half.device)
        if half.half == "device":
            self._roster.heard(half.device)
        if self._pool.knows(half):
            log.debug("the %s half of submission %s of device '%s' came again", half.half, half.submission, half.device)
            self._metrics.write("duplicate", device=half.device, submission=half.submission, half=half.half)
            if half.failures and self._reach is not None:
                self._reach.resent(half.device)
            return False
        newest = self._check(half, device, finished)
        if self._too_old(half, newest.number):
            return False
        part = device_half if half.half == "device" else edge_half
        require_same_keys(state, part(self._aggregation.trained(newest.state, device.own_rank), device.cut))
        for key, value in state.items():
            if not np.isfinite(value).all():
                raise AdapterError(f"adapter tensor {key} of an update of {device.describe()} holds values that are not finite")
            if max(value.max(initial=0.0), -value.min(initial=0.0)) > GREATEST:
                raise AdapterError(
                    f"adapter tensor {key} of an update of {device.describe()} holds values above {GREATEST:g}, which no training"
                    " makes: lower the device's learning rate"
                )
        whole = self._pool.add(half, state, device.own_rank, device.cut)
        if half.half == "device":
            self._note_link(half)
        return whole

    def _note_link(self, half: Half) -> None:
        link = {"bytes_per_s": half.bytes_per_s, "round_trip_s": half.round_trip_s, "failures": half.failures}
        self._metrics.write("upload", device=half.device, submission=half.submission, version=half.version, **link)
        if self._reach is not None:
            self._reach.uploaded(half.device, half.failures)

    def _check(self, half: Half, device: Member, finished: bool) -> Version:
        """The newest version. Raises `RefusedError` unless the half can belong to an update of it or an earlier one."""
        newest = self._store.newest()
        if not half.submission:
            raise RefusedError(f"a submission of {device.describe()} has no id")
        if newest is None or half.version > newest.number:
            raise RefusedError(
                f"{device.describe()} submitted an update of version {half.version}, but the newest is"
                f" {'none' if newest is None else newest.number}"
            )
        if finished:
            raise FinishedError(f"{device.describe()} submitted an update after the federation had finished")
        return newest

    def _too_old(self, half: Half, newest: int) -> bool:
        """Whether a half is more than `max_lag` versions behind; it is set aside then, and its sender not told.

        A device that is slow has done nothing wrong and goes on, which an error would end. Of two halves, the first decides.
        """
        limit, lag = self._settings.strategy.max_lag, newest - half.version
        if not limit or lag <= limit or self._pool.waits_for(half):
            return False
        if self._pool.set_aside(half):
            reason = f"it stems from version {half.version}, {lag} behind the newest: strategy.max_lag is {limit}"
            log.warning("submission %s of device '%s' is refused: %s", half.submission, half.device, reason)
            self._ledger.dropped(half, reason)
            self.refuse(half.device, half.submission, reason)
        return True
