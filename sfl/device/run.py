"""A device's run: train, upload when the rule says so, take over new versions. Knows nothing of gRPC and never blocks."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from enum import Enum
from statistics import median
from time import monotonic
from typing import Any

from sfl.adapters.state import byte_size
from sfl.data.batches import Batch
from sfl.device.checkpoints import Checkpoints
from sfl.device.feedback import rate_controller
from sfl.device.link_meter import LinkMeter
from sfl.device.run_plan import FederationLink, RunPlan
from sfl.device.run_state import Pending, RunState, new_session
from sfl.device.trainer import DeviceTrainer, Figures, WentBack
from sfl.device.triggers import upload_rule
from sfl.errors import SessionLostError, StateError, TooFewExamplesError
from sfl.state_file import Document, Tensors
from sfl.telemetry import MetricsWriter, log
from sfl.v1.federation_pb2 import DEVICE, UpdateHeader, UploadPolicy
from sfl.wire.frames import Traffic
from sfl.wire.split import StepTerms

_RECENT_STEPS = 16  # whose median is what a step takes


class Progress(Enum):
    """What a run has just done."""

    TRAINED = "trained"
    WAITING = "waiting"  # for a version newer than the adapter's


class DeviceRun:
    """`steps` local steps under the federation's upload policy. The one that was announced last says how far apart uploads are
    and what the logits' offsets are; the rest stays as in `policy`, with which the adapter was made.

    `uplink` is told of each transfer by whoever makes it, the federation's client; while it has heard of none, uploads are as
    if it did not matter. `clock` gives seconds that never go back. Raises `WireError` for a policy that this version
    does not know or that cannot be.
    `checkpoints` are kept at the beginning, with each submission and adoption, and every `checkpoint_steps` of the plan: what
    changes is changed here first, and kept, then at the edge.
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
        checkpoints: Checkpoints | None = None,
    ) -> None:
        self._now = RunState(plan.session)
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
        self._checkpoints = checkpoints
        self._kept_at = 0  # the step of the last checkpoint
        self._bytes_before = 0, 0  # sent and received by processes before this one
        self._unfinished: tuple[dict[str, Any], Batch] | None = None  # the batch of a step that is not done, and its place
        self._sent = ""  # the last submission that the federation server has acknowledged
        self._step_seconds: deque[float] = deque(maxlen=_RECENT_STEPS)

    @property
    def steps(self) -> int:
        """Local steps done."""
        return self._now.steps

    @property
    def examples(self) -> int:
        """Examples trained on, one that came again counted again."""
        return self._now.examples

    @property
    def submissions(self) -> int:
        """Submissions that this device has made."""
        return self._now.submissions

    def begin(self, anew: bool = False) -> None:
        """Open the session at the edge; before the first step. `anew` says that an earlier process has left steps in the metrics
        that are no more."""
        version, checkpoint = self._trainer.adapter.version, self.checkpoint()
        self._trainer.edge.begin(self._now.session, version, self.steps, checkpoint)
        if anew:
            self._metrics.write("resume", step=self.steps, version=version, submissions=self.submissions, checkpoint=checkpoint)

    def resume(self, checkpoint: int | None) -> None:
        """Instead of `begin`: go on from the checkpoint at which the edge is, or without it where it is at none.

        Raises `StateError` when it cannot be read.
        """
        if checkpoint is not None:
            self._go_back(checkpoint)
        elif self._checkpoints is not None:
            self._restore(self._checkpoints.newest())
        self._bytes_before = self._now.bytes_sent, self._now.bytes_received
        if checkpoint is None and not self._now.tested:
            self._move()

    def checkpoint(self, must: bool = True) -> int:
        """Keep the state as it is; its number, for the edge to keep its own under, or 0. Raises as `Checkpoints.write`."""
        self._kept_at = self.steps
        return 0 if self._checkpoints is None else self._checkpoints.write(self._state, must)

    def _amend(self) -> None:
        """Have the last checkpoint say what has happened since on this side alone."""
        if self._checkpoints is not None and self._kept_at == self.steps:
            self._checkpoints.amend(self._state)

    def __iter__(self) -> Iterator[Progress]:
        """Train to the end, pausing after each step and, while the rule waits for a version, at each look.

        When the edge has gone back to a checkpoint so does this, and repeats the steps since; when it has lost the session,
        another one begins. Raises `DataError` at the start when the rule validates and there are no examples to do so.
        """
        while True:
            try:
                yield from self._go_on()
                return
            except WentBack as error:
                log.warning("%s", error)
                self._go_back(error.checkpoint)
            except SessionLostError as error:
                log.warning("%s", error)
                self._move()

    def _go_on(self) -> Iterator[Progress]:
        self._send()
        if self._now.unseen:
            self._tell_rule()
        while self.steps < self._plan.steps:
            if self._now.waiting and not self._newer() and not self._federation.finished:
                yield Progress.WAITING
                self._trainer.edge.look()  # of one that has lost its disk nothing would come, however long it is waited for
                continue
            self._stop_waiting()
            self._adopt_newest()
            if (policy := self._federation.policy) is not None:
                self._rule.follow(policy)
            trigger = self._step()
            if trigger is not None:
                self._submit(trigger)
            yield Progress.TRAINED
        if self._policy.final_upload and self._now.pending_steps:
            self._submit("final")
        if not self._now.tested:
            self._amend()  # without the half that has been sent: from here on the federation server is not needed
            self._federation.trained()
            self._evaluate("test", self._plan.test())
            self._now.tested = True
            self._amend()

    def _step(self) -> str | None:
        """One step; the name of the trigger that fired, if any."""
        due = 0 < self._plan.checkpoint_steps <= self.steps - self._kept_at
        checkpoint = self.checkpoint(must=False) if due else 0
        batch = self._next_batch()
        rate_factor = 1.0 if self._rate is None else self._rate.factor
        terms = StepTerms(rate_factor, tuple((self._federation.policy or self._policy).logit_offsets))
        started, now = self._clock(), self._now
        result = self._trainer.step(self.steps + 1, batch, terms, checkpoint)
        self._unfinished = None
        now.steps += 1
        now.examples += len(batch)
        now.pending_steps += 1
        now.pending_examples += len(batch)
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
        upload_s = self._uplink.upload_s(now.upload_bytes)
        if upload_s is not None:
            self._rule.sense(upload_s, median(self._step_seconds))
        return self._rule.after_step(result.layer_norms, self._validate() if self._rule.validation_due() else None)

    def _next_batch(self) -> Batch:
        """The next batch, or again the one of a step that was not finished."""
        if self._unfinished is None:
            place = self._plan.batches.state() if self._checkpoints is not None else {}
            self._unfinished = place, next(self._plan.batches)
        return self._unfinished[1]

    def _newer(self) -> bool:
        return (self._federation.newest or 0) > self._trainer.adapter.version

    def _adopt_newest(self) -> None:
        if not self._newer():
            return
        if self._policy.adopt_after_upload and self._now.pending_steps:
            return
        newest, state = self._federation.fetch_newest(self._plan.cut)
        keep = self._policy.keep_progress
        self._trainer.adapter.adopt(state, newest, keep)
        dropped = 0 if keep else self._drop_progress()
        self._now.unseen = True
        self._trainer.edge.adopt(newest, keep, self.checkpoint())
        self._metrics.write("adopt", step=self.steps, version=newest, dropped_steps=dropped)
        self._tell_rule()

    def _drop_progress(self) -> int:
        """Nothing is left of what was not submitted; how many steps that was."""
        dropped = self._now.pending_steps
        self._now.pending_steps = self._now.pending_examples = 0
        return dropped

    def _tell_rule(self) -> None:
        """The rule sees the version that was taken over, with its figures if it wants them of this one."""
        self._rule.after_adoption(self._validate() if self._rule.reference_due() else None)
        self._now.unseen = False

    def _submit(self, trigger: str) -> None:
        """Set both halves aside, then send this one. Nothing of it leaves either machine before both have kept that they did."""
        now, version = self._now, self._trainer.adapter.version
        header = UpdateHeader(
            submission=f"{now.session}/{now.submissions + 1}",
            device=self._plan.device,
            half=DEVICE,
            version=version,
            examples=now.pending_examples,
            steps=now.pending_steps,
            link=self._uplink.report(),
        )
        progress = self._trainer.adapter.take_progress()
        now.pending = Pending(header, trigger, progress, answered=False)
        now.submissions += 1
        now.upload_bytes = byte_size(progress)
        now.waiting = self._rule.waits and self.steps < self._plan.steps
        self._drop_progress()
        self._rule.after_upload()
        self._trainer.edge.submit(header.submission, version, self.checkpoint())
        now.pending.answered = True
        self._send()

    def _stop_waiting(self) -> None:
        self._now.waiting = False
        if self._now.pending is not None and self._now.pending.sent:
            self._now.pending = None

    def _send(self, again: bool = False) -> bool:
        """Send the half that was set aside, if there is one that was not sent, or `again`; whether the edge's half is there."""
        pending = self._now.pending
        if pending is None:
            return False
        pending.sent = pending.sent or pending.header.submission == self._sent
        if pending.sent and not again:
            return False
        predicted_s = self._uplink.upload_s(self._now.upload_bytes)
        whole = self._federation.submit(pending.header, pending.progress)
        if pending.sent:
            return whole
        self._sent, pending.sent = pending.header.submission, True
        if not self._now.waiting:
            self._now.pending = None
        self._metrics.write(
            "submit",
            step=self.steps,
            version=pending.header.version,
            submission=pending.header.submission,
            trigger=pending.trigger,
            bytes=self._now.upload_bytes,
            threshold_factor=round(self._rule.factor, 4),
            **self._measured(predicted_s),
        )
        return whole

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
            raise TooFewExamplesError(
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

    def _state(self) -> tuple[Document, Tensors]:
        """All that going on depends on, as a document and tensors."""
        self._now.step_seconds = list(self._step_seconds)
        sent = self._bytes()
        self._now.bytes_sent, self._now.bytes_received = sent["bytes_sent"], sent["bytes_received"]
        document, tensors = self._now.saved()
        return {
            "session": self._now.session,
            "version": self._trainer.adapter.version,
            "run": document,
            "policy": (self._federation.policy or self._policy).SerializeToString().hex(),
            "rule": {"kind": self._policy.WhichOneof("rule"), **self._rule.state()},
            "rate": None if self._rate is None else self._rate.state(),
            "uplink": self._uplink.state(),
            "batches": self._plan.batches.state() if self._unfinished is None else self._unfinished[0],
        }, tensors | self._trainer.state()

    def _restore(self, state: tuple[Document, Tensors]) -> None:
        document, tensors = state
        self._now = RunState.restored(document["run"], tensors)
        self._kept_at = self.steps
        self._step_seconds = deque(self._now.step_seconds, maxlen=_RECENT_STEPS)
        if document["rule"]["kind"] == self._policy.WhichOneof("rule"):
            self._rule.restore(document["rule"])
        if self._rate is not None and document["rate"] is not None:
            self._rate.restore(document["rate"])
        self._uplink.restore(document["uplink"])
        self._unfinished = None
        self._plan.batches.restore(document["batches"])
        self._trainer.restore(tensors, document["version"])

    def _go_back(self, checkpoint: int) -> None:
        """Be at this checkpoint, where the edge is; what came after it never was."""
        if self._checkpoints is None:
            raise StateError(f"the edge server is at checkpoint {checkpoint}, and this device keeps none")
        state = self._checkpoints.read(checkpoint)
        self._checkpoints.go_back(checkpoint)
        self._restore(state)
        version = self._trainer.adapter.version
        log.info("going on from checkpoint %d: step %d, version %d", checkpoint, self.steps, version)
        self._metrics.write("resume", step=self.steps, version=version, submissions=self.submissions, checkpoint=checkpoint)

    def _move(self) -> None:
        """Begin another session, at the newest version: the edge, or another one, knows nothing of the last.

        This device's place in its data, its counts and its upload rule stay. What was not submitted is lost, and the
        optimiser begins anew, as they do in the other half. A half that the edge may have set aside its own of is sent all the
        same. If the edge's is not there it will not come any more: the half expires, and its round is trained anew.
        """
        now = self._now
        if self._federation.newest is None:
            if now.sent(self._plan.steps):
                log.warning("the test of %s is left out", self._plan.device)
                now.tested = True
                return
            raise SessionLostError("the edge server knows nothing of this device, and there is no version to begin with")
        if now.pending is not None and not now.pending.answered:
            now.pending = None
        whole = self._send(again=True)
        newest, state = self._federation.fetch_newest(self._plan.cut)  # then: what was sent stems from the version before
        if not whole or newest > self._trainer.adapter.version:
            self._stop_waiting()
        self._trainer.adapter.begin(state, newest)
        dropped = self._drop_progress()
        now.session = new_session(self._plan.device)
        now.unseen = True
        self.begin()
        log.warning("a new session begins at step %d with version %d; %d steps were not submitted", self.steps, newest, dropped)
        self._metrics.write("move", step=self.steps, version=newest, submissions=self.submissions, dropped_steps=dropped)

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
            "bytes_sent": self._bytes_before[0] + sum(traffic.sent for traffic in self._traffic),
            "bytes_received": self._bytes_before[1] + sum(traffic.received for traffic in self._traffic),
        }
