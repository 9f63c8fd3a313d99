"""The federation as a state machine: members join, agree, submit and leave; updates become versions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sfl.adapters.layout import AdapterLayout
from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterState, byte_size, device_half, edge_half, require_same_keys
from sfl.errors import AdapterError, RefusedError, SettingsError, SflError
from sfl.fed_server import server_state
from sfl.fed_server.advice import advice
from sfl.fed_server.aggregation import Aggregation
from sfl.fed_server.agreement import Agreement, agree, check_labels
from sfl.fed_server.logit_adjustment import logit_offsets
from sfl.fed_server.members import Member, Roster, UnknownMemberError
from sfl.fed_server.pool import Half, Pool
from sfl.fed_server.reach import Reach
from sfl.fed_server.strategies import make_strategy
from sfl.fed_server.version_maker import VersionMaker
from sfl.fed_server.versions import Version, VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter, log
from sfl.v1 import federation_pb2 as pb

GREATEST = 1e6  # absolute value in an update: factors are of the order of one, and sums of squares of more may overflow


@dataclass(frozen=True)
class Placement:
    """Where an adapter sits in the uncut model: path of the block list, paths of the head, number of blocks."""

    blocks: str
    head: tuple[str, ...]
    num_layers: int


class Federation:
    """All that the federation server decides. No gRPC, no asyncio: one thread calls it, and `tick` once a second.

    `on_change` is called when something has changed that watchers should hear: `agreement`, `policy`, `version`,
    `finished`, `failure`, or the number of joined devices. `clock` gives seconds that never go back. Updates wait on disk in
    `pool`, without it in a temporary folder. Raises `SettingsError` for labels that cannot be, or are not those of the
    versions that the store resumes from, and for a robust rule that the expected devices are too few for.
    """

    def __init__(
        self,
        settings: FedSettings,
        store: VersionStore,
        metrics: MetricsWriter,
        clock: Callable[[], float] = time.monotonic,
        pool: Path | None = None,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.agreement: Agreement | None = None
        self.failure: SflError | None = None  # why no agreement will ever be reached
        self.finished = False
        self.refused = 0  # updates
        self._gathered: list[Member] = []  # the devices, once all have joined or the time for it is over
        self._offsets: dict[str, tuple[float, ...]] = {}  # of the logits, by device
        if len(settings.labels) == 1:
            raise SettingsError(f"`labels` must be two or more different names, not only '{settings.labels[0]}'")
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
        self._pool = Pool(pool, settings.half_expires_s, clock)
        self._reach = Reach(settings.strategy.overdue, clock) if settings.strategy.reach else None
        self._proposer: str | None = None
        self._roster = Roster(
            settings.devices,
            settings.away_after_s,
            settings.join_wait_s,
            clock,
            earlier=None if newest is None else newest.layout,
            folder=str(store.folder),
            shared_edge_adapter=self._strategy.shared_edge_adapter,
        )
        self._maker = VersionMaker(
            settings, self._aggregation, self._pool, self._roster, self._reach, store, metrics, self.refuse
        )
        if newest is not None:
            self._resume(newest)

    def _resume(self, newest: Version) -> None:
        folder, labels, layout = self._store.folder, self._settings.labels, newest.layout
        if labels and labels != layout.labels:
            raise SettingsError(
                f"the settings name the labels {', '.join(labels)}, but {folder} holds versions for"
                f" {', '.join(layout.labels) or 'none'}: choose another folder with `adapters`"
            )
        log.info("resuming from version %d in %s; choose another folder with `adapters` to start anew", newest.number, folder)
        self.agreement = Agreement(layout.labels, layout.columns, layout.max_length)

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
    def adapter_bytes(self) -> int:
        """Size of the global adapter in bytes, 0 before version 0."""
        newest = self._store.newest()
        return 0 if newest is None else byte_size(newest.state)

    def epsilons(self) -> dict[str, float]:
        """The epsilon that each device has spent so far under differential privacy, else nothing; the run's is the largest."""
        return self._aggregation.epsilons()

    def policy(self, name: str) -> pb.UploadPolicy:
        """When the member `name` uploads, and how it trains; paced by what it has of the data of all once they have joined, and
        until then as the settings say, so that it does not matter who comes first."""
        own = self._roster.get(name).examples
        if not self._gathered or not own:
            return self._aggregation.policy()
        examples = sum(device.examples for device in self._gathered)
        return self._aggregation.policy(own * len(self._gathered) / examples, self._offsets.get(name, ()))

    # Joining and agreeing

    def join(self, member: Member) -> None:
        """Take `member` in, or back. Raises `RefusedError` naming what does not fit, with both values."""
        if self.failure is not None:
            raise self.failure
        known = self._roster.knows(member.name)
        if self.finished and member.role == "device" and not known:
            raise RefusedError(f"{member.describe()} cannot join: the federation has finished; start its server again")
        self._roster.check(member)
        if member.role == "device" and member.task == "classification":
            check_labels(member, self.agreement.labels if self.agreement is not None else self._settings.labels)
        before = self._roster.add(member)
        if before is not None and (before.cut, before.own_rank) != (member.cut, member.own_rank):
            self._log_expired(self._pool.drop(member.name))  # they are halves at the old cut and rank
        if self._reach is not None:
            self._reach.forget(member.name)
        if not known:
            log.info("%s has joined (%d of %d devices are here)", member.describe(), self.joined, self._settings.devices)
            self._metrics.write("join", name=member.name, role=member.role)
        self._agree()
        self._gather()
        self.on_change()

    def _gather(self) -> None:
        """Note who takes part, by which each device's policy goes."""
        self._gathered = self._roster.gathered()
        strength = self._settings.strategy.logit_adjustment
        if strength and self.agreement is not None:
            known = [device for device in self._gathered if device.label_counts]
            counts = {device.name: dict(zip(device.labels, device.label_counts)) for device in known}
            self._offsets = logit_offsets(counts, self.agreement.labels, strength)

    def _agree(self) -> None:
        if self.agreement is not None:
            return
        try:
            self.agreement = agree(self._roster.devices(), self._settings.devices, self._settings.labels)
        except RefusedError as error:
            self.failure = error
            log.error("%s", error)
        if self.agreement is not None:
            labels = self.agreement.labels
            log.info("agreed on %d labels: %s", len(labels), ", ".join(labels) or "none")

    # Versions

    def propose(self, edge: str, placement: Placement, state: AdapterState) -> bool:
        """Take `state` as version 0 if it is the first proposal; whether `edge`'s proposal is version 0.

        Raises `RefusedError` before the agreement and from anyone but an edge server, `AdapterError` when the state does
        not fit the placement and the LoRA settings.
        """
        member = self._roster.get(edge)
        if member.role != "edge":
            raise RefusedError(f"{member.describe()} cannot propose version 0: edge servers do")
        self._roster.heard(edge)
        if self.version is not None:
            return edge == self._proposer
        if self.agreement is None:
            raise RefusedError(f"{member.describe()} proposed version 0 before the devices had agreed on their labels")
        layout = AdapterLayout(
            base_model=member.base_model,
            model_fingerprint=member.model_fingerprint,
            task=member.task,
            lora=member.lora,
            blocks=placement.blocks,
            head=placement.head,
            num_layers=placement.num_layers,
            labels=self.agreement.labels,
            columns=self.agreement.columns,
            max_length=self.agreement.max_length,
        )
        self._store.publish(0, state, layout)
        self._proposer = edge
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
        """Take one half of an update; nothing happens when it had arrived before.

        Raises `RefusedError` for a device or version that is unknown and for halves that do not belong together,
        `AdapterError` when the tensors are not exactly that half of an update at the device's cut and rank, or hold values that
        are not finite or beyond `GREATEST`, and `AdapterWriteError` when they cannot be kept; trying again may help then.
        """
        try:
            self._submit(half, state)
        except (UnknownMemberError, AdapterWriteError):  # the sender does what helps, and tries again
            raise
        except SflError as error:
            self.refuse(half.device, half.submission, str(error))
            raise

    def refuse(self, device: str | None, submission: str | None, reason: str) -> None:
        """Count an update, or what was meant to be one, that is not used; None where it is not even known whose it is."""
        self.refused += 1
        self._metrics.write("refused", device=device, submission=submission, reason=reason)

    def _submit(self, half: Half, state: AdapterState) -> None:
        device = self._roster.device(half.device)
        if half.half == "device":
            self._roster.heard(half.device)
        if self._pool.knows(half):
            log.debug("the %s half of submission %s of device '%s' came again", half.half, half.submission, half.device)
            self._metrics.write("duplicate", device=half.device, submission=half.submission, half=half.half)
            if half.failures and self._reach is not None:
                self._reach.resent(half.device)
            return
        newest = self._check(half, device)
        if self._too_old(half, newest.number):
            return
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
        if whole and self._maker.make_if_due():
            self.on_change()

    def _note_link(self, half: Half) -> None:
        link = {"bytes_per_s": half.bytes_per_s, "round_trip_s": half.round_trip_s, "failures": half.failures}
        self._metrics.write("upload", device=half.device, submission=half.submission, version=half.version, **link)
        if self._reach is not None:
            self._reach.uploaded(half.device, half.failures)

    def _check(self, half: Half, device: Member) -> Version:
        """The newest version. Raises `RefusedError` unless the half can belong to an update of it or an earlier one."""
        newest = self._store.newest()
        if not half.submission:
            raise RefusedError(f"a submission of {device.describe()} has no id")
        if newest is None or half.version > newest.number:
            raise RefusedError(
                f"{device.describe()} submitted an update of version {half.version}, but the newest is"
                f" {'none' if newest is None else newest.number}"
            )
        if self.finished:
            raise RefusedError(f"{device.describe()} submitted an update after the federation had finished")
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
            self.refuse(half.device, half.submission, reason)
        return True

    # Presence and time

    def watch_begins(self, name: str) -> None:
        """`name` has opened a watch. Raises `UnknownMemberError` when it has not joined."""
        self._roster.watch_begins(name)

    def watch_ends(self, name: str) -> None:
        """A watch of `name` is over."""
        self._roster.watch_ends(name)

    def leave(self, name: str) -> None:
        """A device is done. Raises as `Roster.device` does."""
        self._roster.leave(name)
        self.tick()

    def tick(self) -> None:
        """What time brings: halves expire, devices that went away are no longer waited for, the federation ends."""
        self._log_expired(self._pool.expire())
        if self.agreement is None:
            self._forget_away()
        if self.finished:
            return
        if not self._gathered and self._roster.gathered():  # the others are not expected any more
            self._gather()
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
            self.failure = None  # it came from the data of all who were there
            self.on_change()

    def _finish(self) -> None:
        while (left := self._pool.counts()) and self._strategy.final:
            if not self._maker.make():
                return  # it could not be written; the next tick tries again
            self.on_change()
        if left:
            log.info("the rest of the pool, from %s, is left out", ", ".join(sorted(left)))
        self.finished = True
        log.info("all devices are done; version %s is the last", self.version)
        self.on_change()

    def _log_expired(self, halves: list[Half]) -> None:
        for half in halves:
            self._metrics.write("expired", device=half.device, submission=half.submission, half=half.half)
