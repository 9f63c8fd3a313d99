"""The edge's side of split training, without a network: one base, a session for each device."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from google.protobuf.message import DecodeError

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState, edge_half
from sfl.allocator import release_freed_memory
from sfl.edge_server.shared_adapter import SharedAdapter
from sfl.errors import DivergedError, ModelDiffersError, RefusedError, TrainingDiffersError, WireError
from sfl.model import chance
from sfl.model.chance import RandomState
from sfl.model.cut import EdgeHalf, check_cut
from sfl.model.load import check_max_length
from sfl.model.local_adapter import LocalAdapter, values_in
from sfl.model.lora import AdapterSlots
from sfl.model.seeds import dropout_seed
from sfl.model.tasks import IGNORED, adjusted_loss, score
from sfl.state_file import Document, Tensors
from sfl.v1 import split_pb2
from sfl.wire.split import (
    ORDINARY,
    CutBatch,
    Evaluation,
    SessionRequest,
    StepResult,
    StepTerms,
    open_from_wire,
    open_to_wire,
)


@dataclass
class Session:
    """What the edge keeps for one device between two of its requests."""

    request: SessionRequest
    adapter: LocalAdapter | SharedAdapter
    random_state: RandomState  # its own, so that no session's dropout depends on another's steps
    last_step: int = 0
    last_result: StepResult | None = None
    last_submission: str = ""
    progress: AdapterState | None = None  # of `last_submission`
    checkpoint: int = 0  # the newest that is on disk
    closed: bool = False  # the device said that it is done


class EdgeEngine:
    """Trains the edge's half of many devices' adapters over one set of blocks.

    `step` and `evaluate` compute on the shared model and must run one at a time; the rest touches one session only.
    """

    def __init__(self, half: EdgeHalf, slots: AdapterSlots, task: str, lora: LoraSpec, fingerprint: str) -> None:
        self.task = task
        self.hidden_size: int = half.config.hidden_size
        self.lowest_cut = half.lowest_cut
        self._half = half
        self._slots = slots
        self._lora = lora
        self._fingerprint = fingerprint
        self._sessions: dict[str, Session] = {}
        self._shared: tuple[SessionRequest, LocalAdapter] | None = None  # the first request for it, and what sessions share
        self._trained: Session | None = None  # whose step was the last
        self._half.eval()

    def check(self, request: SessionRequest) -> None:
        """Raise `RefusedError` unless the device's half and this edge's are halves of one model and one adapter."""
        if request.model_fingerprint != self._fingerprint:
            raise ModelDiffersError(
                f"the base models differ: fingerprint {request.model_fingerprint[:12]} on {request.device},"
                f" {self._fingerprint[:12]} at the edge; give both the same model"
            )
        if (differing := request.lora.difference(self._lora)) is not None:
            raise TrainingDiffersError(f"the LoRA settings differ between {request.device} and the edge: {differing}")
        if request.task != self.task:
            raise TrainingDiffersError(f"{request.device} trains for {request.task}, this edge for {self.task}")
        if request.rank > self._lora.rank:
            raise TrainingDiffersError(
                f"{request.device} has LoRA rank {request.rank}, above {self._lora.rank}, that of the LoRA settings: lower the"
                " device's `rank`"
            )
        if request.rules.shared_edge_adapter and self._shared is not None:
            _require_alike(request, self._shared[0])
        check_cut(self._half.config, request.cut)
        if request.cut < self._half.lowest_cut:
            raise RefusedError(
                f"cut {request.cut} is below {self._half.lowest_cut}, the lowest that this edge serves: raise the device's"
                " cut, or lower `lowest_cut`"
            )

    def resume(self, request: SessionRequest) -> Session | None:
        """The session of this name if it is known, for a device that reconnects."""
        session = self._sessions.get(request.device)
        return session if session is not None and session.request.session == request.session else None

    def open(self, request: SessionRequest, state: AdapterState, last_step: int = 0) -> Session:
        """Begin a session with global version `request.version`; an earlier session of the device ends.

        Of a device that comes from another edge `last_step` is the last step that it has done.
        `state` holds at least the layers from the cut on, those from `lowest_cut` on where sessions share an adapter.
        Raises as `check` does, and `AdapterError` when it does not fit.
        """
        self.check(request)
        adapter: LocalAdapter | SharedAdapter
        if request.rules.shared_edge_adapter:
            adapter = SharedAdapter(self._share(request, state), request.cut, request.version, request.optimizer)
        else:
            adapter = self._adapter(request, state, request.cut)
        random_state = chance.seeded(dropout_seed(request.seed, request.device, "edge"))
        session = Session(request, adapter, random_state, last_step)
        self._sessions[request.device] = session
        return session

    def state(self, session: Session) -> tuple[Document, Tensors]:
        """What `restore` needs, progress that was set aside excepted; without an adapter where sessions share one.

        An adapter that others train too has no state that belongs to one session's step.
        """
        document = {
            "open": open_to_wire(session.request).SerializeToString().hex(),
            "version": session.adapter.version,
            "last_step": session.last_step,
            "last_submission": session.last_submission,
        }
        if isinstance(session.adapter, SharedAdapter):
            return document, {}
        return document, session.adapter.state() | chance.to_arrays(session.random_state)

    def restore(self, document: Document, tensors: Tensors) -> Session:
        """Be again in the session whose `state` this is; any other session of the device ends.

        Raises as `check` does if this edge is not what it was, and `AdapterError`, `WireError`, `KeyError`, `ValueError` or
        `TypeError` for what is no state.
        """
        request = request_of(document)
        self.check(request)
        version, last_step, last_submission = document["version"], document["last_step"], document["last_submission"]
        adapter = self._adapter(replace(request, version=version), values_in(tensors), request.cut)
        adapter.restore(tensors, version)
        session = Session(request, adapter, chance.from_arrays(tensors), last_step, last_submission=last_submission)
        self._sessions[request.device] = session
        return session

    def step(self, session: Session, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY) -> StepResult:
        """Forward from the cut, backward to it, one optimiser step. The last step asked again is answered again.

        Raises `WireError` when the version is not the session's, the step not the next one, a label or an offset of the logits
        is none of a class, or the loss or a gradient is not finite, and `ModelError` for more tokens than the model takes.
        Nothing has been trained then.
        """
        self._require_version(session, version)
        if step == session.last_step and session.last_result is not None:
            return session.last_result
        if step != session.last_step + 1:
            raise WireError(f"step {step} of {session.request.device} came, step {session.last_step + 1} was due")
        self._require_inputs(batch)
        if self._trained is not session:
            # What a step frees lies between what sessions keep: given back, another device costs its adapter and no holes.
            release_freed_memory()
            self._trained = session
        activation = batch.activation.requires_grad_()
        with chance.apart(session.random_state):
            self._half.train()
            session.adapter.mount()
            loss, logits = self._half(activation, batch.attention_mask, batch.labels, session.request.cut)
            if terms.logit_offsets:
                loss = adjusted_loss(self.task, logits, batch.labels, terms.logit_offsets)
            if not math.isfinite(loss.item()):
                raise DivergedError(
                    f"the loss of step {step} is {loss.item()}: lower the learning rate, and give some token a label"
                )
            loss.backward()
            random_state = chance.current()
        norms, gradient = session.adapter.layer_norms(), _gradient(activation)
        if not (all(map(math.isfinite, norms.values())) and torch.isfinite(gradient).all()):
            raise DivergedError(f"the gradients of step {step} are not finite: lower the learning rate")
        session.random_state = random_state
        session.adapter.step(session.adapter.optimizer.rate(step) * terms.rate_factor)
        result = StepResult(step, version, loss.item(), norms, gradient)
        session.last_step, session.last_result = step, result
        return result

    @torch.no_grad()
    def evaluate(self, session: Session, version: int, batch: CutBatch) -> Evaluation:
        """Loss, and for classification logits, of a batch; nothing is trained. Raises as `step` does."""
        self._require_version(session, version)
        self._require_inputs(batch)
        self._half.eval()
        session.adapter.mount()
        loss, logits = self._half(batch.activation, batch.attention_mask, batch.labels, session.request.cut)
        result = score(self.task, loss, logits, batch.labels)
        mean = result.loss_sum / max(result.count, 1)
        return Evaluation(mean, result.count, logits.float() if self.task == "classification" else None)

    def take_progress(self, session: Session, submission: str, version: int) -> AdapterState:
        """What this half of the device's adapter has learnt and not submitted yet; the same again for the same submission.

        Raises `WireError` when the version is not the session's, and for a submission that was taken and sent before this
        edge was started again.
        """
        self._require_version(session, version)
        if session.last_submission == submission and session.progress is None:
            raise WireError(f"submission {submission} of {session.request.device} has long been sent")
        if session.progress is None or session.last_submission != submission:
            session.progress = session.adapter.take_progress()
            session.last_submission = submission
        return session.progress

    def adopt(self, session: Session, version: int, state: AdapterState, keep_progress: bool) -> None:
        """Go on from global version `version`; asked again for the present one, nothing changes."""
        if version == session.adapter.version:
            return
        if version < session.adapter.version:
            raise WireError(f"version {version} is older than {session.adapter.version}, which {session.request.device} has")
        first = self.lowest_cut if session.request.rules.shared_edge_adapter else session.request.cut
        session.adapter.adopt(edge_half(state, first), version, keep_progress)

    def close(self, session: Session) -> None:
        """Forget a session, unless another one of the device has taken its place."""
        if self._trained is session:
            self._trained = None
        if self._sessions.get(session.request.device) is session:
            del self._sessions[session.request.device]
        if not any(other.request.rules.shared_edge_adapter for other in self._sessions.values()):
            self._shared = None

    def devices(self) -> list[str]:
        """Those that have a session."""
        return list(self._sessions)

    def is_open(self, session: Session) -> bool:
        """Whether this is still the device's session."""
        return self._sessions.get(session.request.device) is session

    def _adapter(self, request: SessionRequest, state: AdapterState, cut: int) -> LocalAdapter:
        half = edge_half(state, cut)
        return LocalAdapter(self._slots, half, cut, request.version, request.optimizer, request.rank, request.rules)

    def _share(self, request: SessionRequest, state: AdapterState) -> LocalAdapter:
        """The adapter that sessions share, at this version or a newer one; what nobody has submitted is kept."""
        if self._shared is None:
            self._shared = request, self._adapter(request, state, self.lowest_cut)
        shared = self._shared[1]
        if request.version > shared.version:
            shared.adopt(edge_half(state, self.lowest_cut), request.version, keep_progress=True)
        return shared

    def _require_version(self, session: Session, version: int) -> None:
        if version != session.adapter.version:
            raise WireError(
                f"{session.request.device} asked with version {version}, its half here stems from version"
                f" {session.adapter.version}: adopt first"
            )

    def _require_inputs(self, batch: CutBatch) -> None:
        """Positions and labels that the model does not have would be read out of bounds, which on a GPU ends the process."""
        config, labels = self._half.config, batch.labels
        check_max_length(config, batch.activation.shape[1])
        if self.task == "classification":
            count, what = int(config.num_labels or 0), "class indices"
        else:
            count, what, labels = int(config.vocab_size), "token ids", labels[labels != IGNORED]
        if ((labels < 0) | (labels >= count)).any():
            raise WireError(f"labels must be {what} below {count}; some are not")


def request_of(document: Document) -> SessionRequest:
    """The request that opened the session whose state has this document. Raises as `EdgeEngine.restore` does."""
    try:
        return open_from_wire(split_pb2.Open.FromString(bytes.fromhex(document["open"])))
    except DecodeError as error:
        raise WireError(f"a session's state does not hold the request that opened it: {error}") from error


def _require_alike(request: SessionRequest, first: SessionRequest) -> None:
    """Raise `RefusedError` unless a device can train the adapter that others share; rates may differ."""
    mine, theirs = request.optimizer, first.optimizer
    for what, value, other in (
        ("rank", request.rank, first.rank),
        ("optimizer", mine.name, theirs.name),
        ("weight_decay", mine.weight_decay, theirs.weight_decay),
        ("rules", request.rules, first.rules),
    ):
        if value != other:
            raise TrainingDiffersError(
                f"{request.device} cannot share the edge's adapter with {first.device}: {what} {value} against {other}; give all"
                " devices the same"
            )


def _gradient(activation: torch.Tensor) -> torch.Tensor:
    if activation.grad is None:
        raise WireError("the loss does not depend on the activation: does every label have -100?")
    return activation.grad
