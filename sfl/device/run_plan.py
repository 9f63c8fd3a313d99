"""What a device's run needs: its data and its numbers, and the federation server as it sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from sfl.adapters.state import AdapterState
from sfl.data.batches import Batch
from sfl.errors import FinishedError
from sfl.v1.federation_pb2 import UpdateHeader, UploadPolicy


class TrainingBatches(Protocol):
    """Endless batches, from a place that can be kept; see `sfl.data.batches.Batches`."""

    def __next__(self) -> Batch:
        """The next batch."""

    def state(self) -> dict[str, Any]:
        """The place."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a place that was kept."""


class FederationLink(Protocol):
    """The federation server as a running device sees it."""

    @property
    def newest(self) -> int | None:
        """The newest published version."""

    @property
    def policy(self) -> UploadPolicy | None:
        """The upload policy as it was announced last."""

    @property
    def finished(self) -> bool:
        """Whether there will be no further version."""

    def fetch_newest(self, last_layer: int) -> tuple[int, AdapterState]:
        """The number of the newest version, which may be newer than `newest`, and its layers below `last_layer`."""

    def submit(self, header: UpdateHeader, state: AdapterState) -> bool:
        """Send this device's half of an update; it counts once, however often. Whether the edge's half is there, too."""

    def trained(self) -> None:
        """Say that all steps are done and submitted, so that nobody waits for this device while it evaluates."""


class FinishedFederation:
    """A federation that has ended without a device which has only its test left to do."""

    newest = None
    policy = None
    finished = True

    def fetch_newest(self, last_layer: int) -> tuple[int, AdapterState]:
        raise FinishedError("no version can be fetched: the federation has finished")

    def submit(self, header: UpdateHeader, state: AdapterState) -> bool:
        raise FinishedError(f"submission {header.submission} comes too late: the federation has finished")

    def trained(self) -> None:
        """It does not wait any more."""


@dataclass(frozen=True)
class RunPlan:
    """What a run does and with what. `validation` and `test` begin anew with each call.

    `session` names the run at its first edge. With `checkpoint_steps` a checkpoint comes after so many steps without one.
    """

    device: str
    session: str
    cut: int
    steps: int
    batches: TrainingBatches
    validation: Callable[[], Iterable[Batch]]
    test: Callable[[], Iterable[Batch]]
    checkpoint_steps: int = 0
