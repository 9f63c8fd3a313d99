"""The federation as a state machine: members join, agree, submit and leave; updates become versions."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from sfl.adapters.layout import AdapterLayout
from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import AdapterState, byte_size, device_half, edge_half, require_same_keys
from sfl.errors import AdapterError, RefusedError, SettingsError, SflError
from sfl.fed_server.members import Member, Roster
from sfl.fed_server.pool import Half, Pool
from sfl.fed_server.strategies import make_strategy
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter, counted, log
from sfl.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class Agreement:
    """What all devices have in common: class names in the order of the logits, flow columns, tokens."""

    labels: tuple[str, ...]
    columns: tuple[str, ...]
    max_length: int


@dataclass(frozen=True)
class Placement:
    """Where an adapter sits in the uncut model: path of the block list, paths of the head, number of blocks."""

    blocks: str
    head: tuple[str, ...]
    num_layers: int


class Federation:
    """All that the federation server decides. No gRPC, no asyncio: one thread calls it, and `tick` once a second.

    `on_change` is called when something has changed that watchers should hear: `agreement`, `version`, `finished`,
    `failure`, or the number of joined devices. `clock` gives seconds that never go back. Raises `SettingsError` for labels
    that cannot be, or are not those of the versions that the store resumes from.
    """

    def __init__(
        self,
        settings: FedSettings,
        store: VersionStore,
        metrics: MetricsWriter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.on_change: Callable[[], None] = lambda: None
        self.agreement: Agreement | None = None
        self.failure: SflError | None = None  # why no agreement will ever be reached
        self.finished = False
        self.aggregations = 0
        if len(settings.labels) == 1:
            raise SettingsError(f"`labels` must be two or more different names, not only '{settings.labels[0]}'")
        self._settings = settings
        self._store = store
        self._metrics = metrics
        self._clock = clock
        self._strategy = make_strategy(settings.strategy)
        self._pool = Pool(settings.half_expires_s, clock)
        self._proposer: str | None = None
        newest = store.newest()
        earlier = None if newest is None else newest.layout
        self._roster = Roster(settings.devices, settings.away_after_s, settings.join_wait_s, clock, earlier, str(store.folder))
        if newest is not None:
            self._resume(newest.number, newest.layout)

    def _resume(self, version: int, layout: AdapterLayout) -> None:
        folder, labels = self._store.folder, self._settings.labels
        if labels and labels != layout.labels:
            raise SettingsError(
                f"the settings name the labels {', '.join(labels)}, but {folder} holds versions for"
                f" {', '.join(layout.labels) or 'none'}: choose another folder with `adapters`"
            )
        log.info("resuming from version %d in %s; choose another folder with `adapters` to start anew", version, folder)
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
    def submissions(self) -> int:
        """Whole submissions so far."""
        return self._pool.submissions()

    @property
    def adapter_bytes(self) -> int:
        """Size of the global adapter in bytes, 0 before version 0."""
        newest = self._store.newest()
        return 0 if newest is None else byte_size(newest.state)

    def policy(self) -> pb.UploadPolicy:
        """When devices upload."""
        return self._strategy.policy()

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
            self._check_labels(member)
        before = self._roster.add(member)
        if before is not None and before.cut != member.cut:
            self._log_expired(self._pool.drop(member.name))  # they are halves at the old cut
        if not known:
            log.info("%s has joined (%d of %d devices are here)", member.describe(), self.joined, self._settings.devices)
            self._metrics.write("join", name=member.name, role=member.role)
        self._agree()
        self.on_change()

    def _check_labels(self, member: Member) -> None:
        allowed = self.agreement.labels if self.agreement is not None else self._settings.labels
        unknown = sorted(set(member.labels) - set(allowed))
        if allowed and unknown:
            raise RefusedError(
                f"{member.describe()} has the label '{unknown[0]}', which is not among those agreed: {', '.join(allowed)};"
                " name all labels with `labels` in the federation server's settings"
            )
        if not member.labels:
            raise RefusedError(f"{member.describe()} cannot join: classification needs labels and its data has none")

    def _agree(self) -> None:
        """Agree once all expected devices have joined, or at the first device when the settings name the labels."""
        devices = self._roster.devices()
        if self.agreement is not None or not devices:
            return
        fixed = self._settings.labels if devices[0].task == "classification" else ()
        if len(devices) < (1 if fixed else self._settings.devices):
            return
        labels: tuple[str, ...] = ()
        if devices[0].task == "classification":
            labels = fixed or tuple(sorted({label for device in devices for label in device.labels}))
            if len(labels) < 2:
                self.failure = RefusedError(
                    f"all devices together have seen only one class, '{labels[0]}': a classifier needs two or more; name"
                    " the classes with `labels` in the federation server's settings, or give some device other data"
                )
                log.error("%s", self.failure)
                return
        self.agreement = Agreement(labels, devices[0].columns, devices[0].max_length)
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

    def fetch(self, name: str, version: int, first_layer: int = 0, last_layer: int = 0) -> AdapterState:
        """The tensors of `version` in layers `first_layer` to `last_layer` - 1; to the end, with the head, for 0.

        Raises `RefusedError` for a version that is not there, and for layers below the lowest cut of an edge server.
        """
        member = self._roster.get(name)
        self._roster.heard(name)
        if member.role == "edge" and first_layer < member.cut:
            raise RefusedError(
                f"{member.describe()} asked for layers from {first_layer} on, but joined with {member.cut} as its lowest cut:"
                " what lies below it belongs to devices"
            )
        try:
            state = self._store.load(version)
        except AdapterError as error:
            raise RefusedError(str(error)) from error
        upper = edge_half(state, first_layer)
        return device_half(upper, last_layer) if last_layer else upper

    # Updates

    def submit(self, half: Half, state: AdapterState) -> None:
        """Take one half of an update; nothing happens when it had arrived before.

        Raises `RefusedError` for a device or version that is unknown and for halves that do not belong together,
        `AdapterError` when the tensors are not exactly that half of the global adapter at the device's cut.
        """
        device = self._roster.device(half.device)
        if half.half == "device":
            self._roster.heard(half.device)
        if self._pool.knows(half):
            return
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
        part = device_half if half.half == "device" else edge_half
        require_same_keys(state, part(newest.state, device.cut))
        if self._pool.add(half, state):
            self._aggregate_if_due()

    def _aggregate_if_due(self) -> None:
        """Aggregate when the strategy says so; while all devices are away, wait for one that comes back or for the end."""
        pooled, present = self._pool.devices(), self._roster.present_devices()
        if pooled and present and self._strategy.due(pooled, present, self._roster.missing(), self._pool.waited_s()):
            self._aggregate()

    def _aggregate(self) -> None:
        newest = self._store.newest()
        if newest is None:
            return
        started = time.perf_counter()
        devices = self._pool.devices()
        updates = self._pool.updates({device: self._roster.get(device).examples for device in devices})
        try:
            state, weights = self._strategy.aggregate(newest.state, updates, self._roster.examples(devices))
            self._store.publish(newest.number + 1, state, newest.layout)
        except AdapterWriteError as error:  # a full disk, say; the pool stays, and the next tick tries again
            log.error("%s", error)
            return
        except AdapterError as error:  # would come again at every tick
            log.error("the updates of %s are lost: %s", ", ".join(sorted(devices)), error)
            self._pool.clear()
            return
        self._pool.clear()
        self.aggregations += 1
        pooled = sum(update.pooled for update in updates)
        self._metrics.write(
            "aggregate",
            version=newest.number + 1,
            devices=weights,
            lags={update.device: newest.number - update.version for update in updates},
            submissions=pooled,
            steps={update.device: update.steps for update in updates},
            trained_on={update.device: update.trained_on for update in updates},
            wall_s=round(time.perf_counter() - started, 4),
        )
        submissions = counted(pooled, "submission", "submissions")
        log.info("version %d from %s of %s", newest.number + 1, submissions, ", ".join(sorted(weights)))
        self.on_change()

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
        if self._roster.all_done() and self.version is not None:
            self._finish()
        else:
            self._aggregate_if_due()

    def _forget_away(self) -> None:
        """Nothing rests on who has gone before the agreement; so it may come back with corrected settings, or another name."""
        forgotten = self._roster.forget_away()
        for member in forgotten:
            log.info("%s has gone and is forgotten", member.describe())
        if forgotten:
            self.failure = None  # it came from the data of all who were there
            self.on_change()

    def _finish(self) -> None:
        if self._pool.devices() and self._strategy.final:
            self._aggregate()
            if self._pool.devices():
                return  # it could not be written; the next tick tries again
        elif self._pool.devices():
            log.info("the rest of the pool, from %s, is left out", ", ".join(sorted(self._pool.devices())))
        self.finished = True
        log.info("all devices are done; version %s is the last", self.version)
        self.on_change()

    def _log_expired(self, halves: list[Half]) -> None:
        for half in halves:
            self._metrics.write("expired", device=half.device, submission=half.submission, half=half.half)
