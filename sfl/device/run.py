"""A device's run: train, upload when the rule says so, take over new versions. Knows nothing of gRPC and never blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from statistics import median
from time import monotonic
from typing import Any, Protocol

from sfl.adapters.state import AdapterState, byte_size
from sfl.data.batches import Batch
from sfl.device.feedback import rate_controller
from sfl.device.link_meter import LinkMeter
from sfl.device.trainer import DeviceTrainer, Figures
from sfl.device.triggers import upload_rule
from sfl.errors import DataError
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2 import DEVICE, UpdateHeader, UploadPolicy
from sfl.wire.frames import Traffic
from sfl.wire.split import StepTerms

_RECENT_STEPS = 16  # whose median is what a step takes


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
    """`steps` local steps under the federation's upload policy. The one that was announced last says how far apart uploads are
    and what the logits' offsets are; the rest stays as in `policy`, with which the adapter was made.

    `uplink` is told of each transfer by whoever makes it, the federation's client; while it has heard of none, uploads are as
    if it did not matter. `clock` gives seconds that never go back. Raises `WireError` for a policy that this version
    does not know or that cannot be.
    """

    def __init__(
        self,
        plan: RunPlan,
        trainer: DeviceTrainer,
        policy: UploadPolicy,
        federation: FederationLink,
        metrics: MetricsWriter,
        traffic: Sequence[Traffic] = (),
        uplink: LinkMeter | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self.submissions = 0
        self.examples = 0
        self.steps = 0
        self._plan = plan
        self._trainer = trainer
        self._policy = policy
        self._rule = upload_rule(policy)
        self._rate = rate_controller(policy)
        self._federation = federation
        self._metrics = metrics
        self._traffic = traffic
        self._uplink = uplink or LinkMeter()
        self._clock = clock
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._upload_bytes = 0  # of the last upload, and so of the next
        self._pending_steps = 0  # that the next update holds
        self._pending_examples = 0

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end, pausing after each step and, while the rule waits for a version, at each look.

        Raises `DataError` at the start when the rule validates and there are no examples to do so.
        """
        if self._rule.reference_due():
            self._rule.after_adoption(self._validate())
        while self.steps < self._plan.steps:
            self._adopt_newest()
            if (policy := self._federation.policy) is not None:
                self._rule.follow(policy)
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
        if self._policy.final_upload and self._pending_steps:
            self._submit("final")
        self._evaluate("test", self._plan.test())

    def _step(self, batch: Batch) -> str | None:
        """One step; the name of the trigger that fired, if any."""
        rate_factor = 1.0 if self._rate is None else self._rate.factor
        terms = StepTerms(rate_factor, tuple((self._federation.policy or self._policy).logit_offsets))
        started = self._clock()
        self.steps += 1
        self.examples += len(batch)
        self._pending_steps += 1
        self._pending_examples += len(batch)
        result = self._trainer.step(self.steps, batch, terms)
        wall_s = self._clock() - started
        self._step_seconds.append(wall_s)
        self._metrics.write(
            "step",
            step=self.steps,
            version=self._trainer.adapter.version,
            loss=result.loss,
            examples=len(batch),
            wall_s=round(wall_s, 6),
            **({} if rate_factor == 1 else {"rate_factor": rate_factor}),
            **self._bytes(),
        )
        upload_s = self._uplink.upload_s(self._upload_bytes)
        if upload_s is not None:
            self._rule.sense(upload_s, median(self._step_seconds))
        return self._rule.after_step(result.layer_norms, self._validate() if self._rule.validation_due() else None)

    def _newer(self) -> bool:
        return (self._federation.newest or 0) > self._trainer.adapter.version

    def _adopt_newest(self) -> None:
        if not self._newer():
            return
        if self._policy.adopt_after_upload and self._pending_steps:
            return
        newest, state = self._federation.fetch_newest(self._plan.cut)
        self._trainer.adopt(newest, state, self._policy.keep_progress)
        dropped = 0 if self._policy.keep_progress else self._pending_steps
        if dropped:
            self._pending_steps = self._pending_examples = 0
        self._metrics.write("adopt", step=self.steps, version=newest, dropped_steps=dropped)
        self._rule.after_adoption(self._validate() if self._rule.reference_due() else None)

    def _submit(self, trigger: str) -> None:
        submission = f"{self._plan.session}/{self.submissions + 1}"
        header = UpdateHeader(
            submission=submission,
            device=self._plan.device,
            half=DEVICE,
            version=self._trainer.adapter.version,
            examples=self._pending_examples,
            steps=self._pending_steps,
            link=self._uplink.report(),
        )
        progress = self._trainer.take_progress(submission)
        self._upload_bytes = byte_size(progress)
        predicted_s = self._uplink.upload_s(self._upload_bytes)
        self._federation.submit(header, progress)
        self.submissions += 1
        self._pending_steps = self._pending_examples = 0
        self._rule.after_upload()
        self._metrics.write(
            "submit",
            step=self.steps,
            version=header.version,
            submission=submission,
            trigger=trigger,
            bytes=self._upload_bytes,
            threshold_factor=round(self._rule.factor, 4),
            **self._measured(predicted_s),
        )

    def _measured(self, predicted_s: float | None) -> dict[str, Any]:
        """What the link meter knows of the upload that was just made; nothing where nobody tells it."""
        latest, bytes_per_s = self._uplink.latest, self._uplink.bytes_per_s
        if latest is None or bytes_per_s is None:
            return {}
        foreseen = {} if predicted_s is None else {"predicted_s": round(predicted_s, 4)}
        return foreseen | {"upload_s": round(latest.seconds, 4), "failures": latest.failures, "bytes_per_s": round(bytes_per_s)}

    def _validate(self) -> Figures:
        figures = self._evaluate("validation", self._plan.validation())
        if not figures.count:
            raise DataError(
                f"the federation has its devices validate, and {self._plan.device} has nothing for it: set `data.validation`"
                " above 0 and see that the data are enough, or the federation server's `validate_every` to 0"
            )
        if self._rate is not None:
            self._rate.look(figures.loss)
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
