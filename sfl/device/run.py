"""A device's run: train, upload when the rule says so, take over new versions. Knows nothing of gRPC and never blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from time import monotonic
from typing import Protocol

from sfl.adapters.state import AdapterState, byte_size
from sfl.data.batches import Batch
from sfl.device.trainer import DeviceTrainer, Figures
from sfl.device.triggers import upload_rule
from sfl.errors import DataError
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2 import DEVICE, UpdateHeader, UploadPolicy
from sfl.wire.frames import Traffic


class FederationLink(Protocol):
    """The federation server as a running device sees it."""

    @property
    def newest(self) -> int | None:
        """The newest published version."""

    @property
    def finished(self) -> bool:
        """Whether there will be no further version."""

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0) -> AdapterState:
        """The layers `first_layer` to `last_layer` - 1 of a version."""

    def submit(self, header: UpdateHeader, state: AdapterState) -> None:
        """Send this device's half of an update."""


class Progress(Enum):
    """What a run has just done."""

    TRAINED = "trained"
    WAITING = "waiting"  # for a version newer than the adapter's


@dataclass(frozen=True)
class RunPlan:
    """What a run does and with what. `validation` and `test` begin anew with each call."""

    device: str
    session: str
    cut: int
    steps: int
    batches: Iterator[Batch]
    validation: Callable[[], Iterable[Batch]]
    test: Callable[[], Iterable[Batch]]


class DeviceRun:
    """`steps` local steps under the federation's upload policy."""

    def __init__(
        self,
        plan: RunPlan,
        trainer: DeviceTrainer,
        policy: UploadPolicy,
        federation: FederationLink,
        metrics: MetricsWriter,
        traffic: Sequence[Traffic] = (),
    ) -> None:
        self.submissions = 0
        self.examples = 0
        self.steps = 0
        self._plan = plan
        self._trainer = trainer
        self._policy = policy
        self._rule = upload_rule(policy)
        self._federation = federation
        self._metrics = metrics
        self._traffic = traffic
        self._submitted_steps = 0
        self._submitted_examples = 0

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end, pausing after each step and, while the rule waits for a version, at each look.

        Raises `DataError` at the start when the rule validates and there are no examples to do so.
        """
        if self._rule.validates:
            self._rule.after_adoption(self._validate())
        while self.steps < self._plan.steps:
            self._adopt_newest()
            trigger = self._step(next(self._plan.batches))
            if trigger is not None:
                self._submit(trigger)
            yield Progress.TRAINED
            while (
                trigger
                and self._rule.waits
                and self.steps < self._plan.steps
                and not self._newer()
                and not self._federation.finished
            ):
                yield Progress.WAITING
        if self._policy.final_upload and self.steps > self._submitted_steps:
            self._submit("final")
        self._evaluate("test", self._plan.test())

    def _step(self, batch: Batch) -> str | None:
        """One step; the name of the trigger that fired, if any."""
        started = monotonic()
        self.steps += 1
        self.examples += len(batch)
        result = self._trainer.step(self.steps, batch)
        self._metrics.write(
            "step",
            step=self.steps,
            version=self._trainer.adapter.version,
            loss=result.loss,
            examples=len(batch),
            wall_s=round(monotonic() - started, 6),
            **self._bytes(),
        )
        return self._rule.after_step(result.layer_norms, self._validate() if self._rule.validation_due() else None)

    def _newer(self) -> bool:
        return (self._federation.newest or 0) > self._trainer.adapter.version

    def _adopt_newest(self) -> None:
        newest = self._federation.newest
        if newest is None or newest <= self._trainer.adapter.version:
            return
        state = self._federation.fetch(newest, 0, self._plan.cut)
        self._trainer.adopt(newest, state, self._policy.keep_progress)
        self._metrics.write("adopt", step=self.steps, version=newest)
        self._rule.after_adoption(self._validate() if self._rule.validates else None)

    def _submit(self, trigger: str) -> None:
        submission = f"{self._plan.session}/{self.submissions + 1}"
        header = UpdateHeader(
            submission=submission,
            device=self._plan.device,
            half=DEVICE,
            version=self._trainer.adapter.version,
            examples=self.examples - self._submitted_examples,
            steps=self.steps - self._submitted_steps,
        )
        progress = self._trainer.take_progress(submission)
        self._federation.submit(header, progress)
        self.submissions += 1
        self._submitted_steps, self._submitted_examples = self.steps, self.examples
        self._rule.after_upload()
        self._metrics.write(
            "submit", step=self.steps, version=header.version, submission=submission, trigger=trigger, bytes=byte_size(progress)
        )

    def _validate(self) -> Figures:
        figures = self._evaluate("validation", self._plan.validation())
        if not figures.count:
            raise DataError(
                f"the federation has its devices validate, and {self._plan.device} has nothing for it: set `data.validation`"
                " above 0 and see that the data are enough, or the federation server's `validate_every` to 0"
            )
        return figures

    def _evaluate(self, split: str, batches: Iterable[Batch]) -> Figures:
        """Figures of `batches`; they are reported unless there was nothing to evaluate."""
        figures = self._trainer.evaluate(batches)
        if not figures.count:
            return figures
        shown = {name: value for name, value in asdict(figures).items() if value is not None}
        self._metrics.write("eval", split=split, step=self.steps, version=self._trainer.adapter.version, **shown)
        return figures

    def totals(self) -> dict[str, int]:
        """What this run has come to so far."""
        return {
            "steps": self.steps,
            "examples": self.examples,
            "submissions": self.submissions,
            "version": self._trainer.adapter.version,
            **self._bytes(),
        }

    def _bytes(self) -> dict[str, int]:
        return {
            "bytes_sent": sum(traffic.sent for traffic in self._traffic),
            "bytes_received": sum(traffic.received for traffic in self._traffic),
        }
