"""What the devices agree on, and how each of them is to train and upload."""

from __future__ import annotations

from pathlib import Path

from sfl.adapters.layout import AdapterLayout
from sfl.errors import RefusedError, SettingsError, SflError
from sfl.fed_server.aggregation import Aggregation
from sfl.fed_server.agreement import Agreement, agree, check_labels
from sfl.fed_server.logit_adjustment import logit_offsets
from sfl.fed_server.members import Member
from sfl.fed_server.roster import Roster
from sfl.settings import FedSettings
from sfl.telemetry import log
from sfl.v1 import federation_pb2 as pb


class Terms:
    """The `agreement`, once there is one, or the `failure` for which there will be none, and the upload policies.

    Raises `SettingsError` for labels that cannot be.
    """

    def __init__(self, settings: FedSettings, roster: Roster, aggregation: Aggregation) -> None:
        self.agreement: Agreement | None = None
        self.failure: SflError | None = None
        self._settings = settings
        self._roster = roster
        self._aggregation = aggregation
        self._offsets: dict[str, tuple[float, ...]] = {}  # of the logits, by device
        if len(settings.labels) == 1:
            raise SettingsError(f"`labels` must be two or more different names, not only '{settings.labels[0]}'")

    def resume(self, layout: AdapterLayout, folder: Path) -> None:
        """Go on with what was agreed on in an earlier run. Raises `SettingsError` when the settings name other labels."""
        labels = self._settings.labels
        if labels and labels != layout.labels:
            raise SettingsError(
                f"the settings name the labels {', '.join(labels)}, but {folder} holds versions for"
                f" {', '.join(layout.labels) or 'none'}: choose another folder with `adapters`"
            )
        self.agreement = Agreement(layout.labels, layout.columns, layout.max_length)

    def check(self, member: Member) -> None:
        """Raise `RefusedError` for a device whose labels do not go with those of the others."""
        if member.role == "device" and member.task == "classification":
            check_labels(member, self.agreement.labels if self.agreement is not None else self._settings.labels)

    def agree(self) -> None:
        """Agree, if all that it takes have joined and it has not been done."""
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

    def gather(self) -> None:
        """Note who takes part, by which each device's policy goes once all have joined."""
        self._roster.gather()
        strength = self._settings.strategy.logit_adjustment
        if strength and self.agreement is not None:
            known = [device for device in self._roster.gathered() if device.label_counts]
            counts = {device.name: dict(zip(device.labels, device.label_counts)) for device in known}
            self._offsets = logit_offsets(counts, self.agreement.labels, strength)

    def policy(self, name: str) -> pb.UploadPolicy:
        """When the member `name` uploads, and how it trains; paced by what it has of the data of all once they have joined, and
        until then as the settings say, so that it does not matter who comes first."""
        own, gathered = self._roster.get(name).examples, self._roster.gathered()
        if not gathered or not own:
            return self._aggregation.policy()
        examples = sum(device.examples for device in gathered)
        return self._aggregation.policy(own * len(gathered) / examples, self._offsets.get(name, ()))
