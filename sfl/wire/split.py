"""What a device and its edge server say to each other, as data, and its form on the wire."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sfl.adapters.layout import LoraSpec
from sfl.errors import DivergedError, WireError
from sfl.v1 import split_pb2 as pb
from sfl.v1 import tensor_pb2
from sfl.v1.federation_pb2 import UploadPolicy
from sfl.wire.adapters import lora_from_wire, lora_to_wire
from sfl.wire.tensors import FORMATS, RawTensor, require
from sfl.wire.torch_tensors import WIRE_DTYPE, from_torch, to_torch


@dataclass(frozen=True)
class OptimizerSpec:
    """The optimiser of both halves of a device's adapter: equal settings make split training equal to unsplit.

    With w `warmup_steps`, the learning rate of step t, counted from 1, is `learning_rate` times t / (w + 1) up to t = w, and
    from there on 1 - (t - 1 - w) / (decay_steps - w), or 1 where `decay_steps` is 0.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    decay_steps: int = 0
    warmup_steps: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`."""
        warmup = self.warmup_steps
        if step <= warmup:
            return self.learning_rate * (step / (warmup + 1))
        if not self.decay_steps:
            return self.learning_rate
        return self.learning_rate * max(0.0, 1 - (step - 1 - warmup) / (self.decay_steps - warmup))


@dataclass(frozen=True)
class TrainingRules:
    """What the federation's strategy asks of both halves of a device's adapter; see `UploadPolicy` in federation.proto.

    `proximal` is FedProx's mu. `frozen_parts` are the parts of the factors, "A" or "B", that are applied and not trained.
    With `fresh_optimizer` the moments begin anew with each adopted version. `shared_edge_adapter` concerns the edge alone.
    """

    proximal: float = 0.0
    frozen_parts: tuple[str, ...] = ()
    fresh_optimizer: bool = False
    shared_edge_adapter: bool = False


@dataclass(frozen=True)
class SessionRequest:
    """Opens, or resumes, the training session `session` of `device` at its edge; see `Open` in split.proto.

    `rank` is that of the device's factors, 0 for `lora.rank`.
    """

    session: str
    device: str
    task: str
    cut: int
    version: int
    model_fingerprint: str
    lora: LoraSpec
    optimizer: OptimizerSpec
    seed: int
    dtype: str
    rank: int = 0
    rules: TrainingRules = TrainingRules()


@dataclass(frozen=True)
class Standing:
    """Where a device stands when it opens a stream; see `Standing` in split.proto."""

    resume: bool = False
    restored: bool = False
    checkpoints: tuple[int, ...] = ()
    last_step: int = 0

    @property
    def first_checkpoint(self) -> int:
        """Of a session that begins: the number to keep it under, 0 for none."""
        return self.checkpoints[-1] if self.checkpoints else 0


@dataclass(frozen=True)
class CutBatch:
    """One batch at the cut layer.

    `activation` is (batch, tokens, hidden) in the session's dtype, `attention_mask` (batch, tokens) int64 and `labels`
    int64: (batch,) class indices, or (batch, tokens) token ids with -100 where no loss is due.
    """

    activation: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class StepResult:
    """The edge's answer to a training step.

    `gradient` is that of the loss with respect to the activation, same shape and dtype; `layer_norms` the L2 norm of the
    gradient of each adapter layer that the edge holds, by layer index, the head under `HEAD`.
    """

    step: int
    version: int
    loss: float
    layer_norms: dict[int, float]
    gradient: torch.Tensor


@dataclass(frozen=True)
class StepTerms:
    """On what terms a step trains: its learning rate is the schedule's times `rate_factor`, and `logit_offsets`, one of each
    class where there are any, are added to the logits in its loss (see `sfl.fed_server.logit_adjustment`)."""

    rate_factor: float = 1.0
    logit_offsets: tuple[float, ...] = ()


ORDINARY = StepTerms()


@dataclass(frozen=True)
class Evaluation:
    """Mean `loss` over `count` examples (classification) or tokens (causal LM), and for classification the logits,
    (batch, classes) float32."""

    loss: float
    count: int
    logits: torch.Tensor | None


def rules_from_wire(message: pb.Open | UploadPolicy) -> TrainingRules:
    """Raises `WireError` for a proximal term that is no number or below 0, and for parts that cannot be frozen."""
    if not 0 <= message.proximal < math.inf:
        raise WireError(f"the proximal term's mu is {message.proximal}: it must be a number, 0 or above")
    parts = tuple(sorted(set(message.frozen_parts)))
    if parts not in ((), ("A",), ("B",)):
        raise WireError(f"the parts {', '.join(parts)} of the factors cannot be frozen together: A can, or B")
    return TrainingRules(message.proximal, parts, message.fresh_optimizer, message.shared_edge_adapter)


def terms_from_wire(message: pb.Step) -> StepTerms:
    """Raises `WireError` unless the factor on the learning rate is a number above 0, or left out, and the offsets are finite."""
    factor, offsets = message.learning_rate_factor or 1.0, tuple(message.logit_offsets)
    if not 0 < factor < math.inf:
        raise WireError(f"the factor on the learning rate of step {message.step} is {factor}: it must be a number above 0")
    if not all(map(math.isfinite, offsets)):
        raise WireError(f"the logits' offsets of step {message.step} are {offsets}: they must be numbers")
    return StepTerms(factor, offsets)


def step_request(step: int, version: int, terms: StepTerms, checkpoint: int = 0) -> pb.Step:
    """The request for a training step; the ordinary terms take no bytes."""
    factor = 0.0 if terms.rate_factor == 1.0 else terms.rate_factor
    offsets = terms.logit_offsets
    return pb.Step(step=step, version=version, learning_rate_factor=factor, logit_offsets=offsets, checkpoint=checkpoint)


def standing_from_wire(message: pb.Open) -> Standing:
    """Raises `WireError` for checkpoints that are not numbers from 1 on in their order."""
    found = message.standing
    checkpoints = tuple(found.checkpoints)
    if list(checkpoints) != sorted(set(checkpoints)) or 0 in checkpoints:
        raise WireError(f"the checkpoints {', '.join(map(str, checkpoints))} of {message.device} are not numbers in their order")
    return Standing(found.resume, found.restored, checkpoints, found.last_step)


def open_to_wire(request: SessionRequest, standing: Standing | None = None) -> pb.Open:
    """What opens a session; a `standing` that says nothing takes no bytes."""
    optimizer, rules = request.optimizer, request.rules
    message = pb.Open(
        session=request.session,
        device=request.device,
        task=request.task,
        cut=request.cut,
        version=request.version,
        model_fingerprint=request.model_fingerprint,
        lora=lora_to_wire(request.lora),
        optimizer=pb.Optimizer(
            name=optimizer.name,
            learning_rate=optimizer.learning_rate,
            weight_decay=optimizer.weight_decay,
            decay_steps=optimizer.decay_steps,
            warmup_steps=optimizer.warmup_steps,
        ),
        seed=request.seed,
        dtype=request.dtype,
        rank=request.rank,
        proximal=rules.proximal,
        frozen_parts=rules.frozen_parts,
        shared_edge_adapter=rules.shared_edge_adapter,
        fresh_optimizer=rules.fresh_optimizer,
    )
    if standing is not None and standing != Standing():
        message.standing.CopyFrom(
            pb.Standing(
                resume=standing.resume,
                restored=standing.restored,
                checkpoints=standing.checkpoints,
                last_step=standing.last_step,
            )
        )
    return message


def open_from_wire(message: pb.Open) -> SessionRequest:
    """Raises `WireError` for a name that is missing, an optimiser or a dtype that is unknown or cannot work, and as
    `rules_from_wire` does."""
    if not message.session or not message.device:
        raise WireError("a session and its device must have a name")
    name = message.optimizer.name
    if name not in ("adamw", "sgd"):
        raise WireError(f"unknown optimizer '{name}': adamw and sgd are known")
    for what in ("learning_rate", "weight_decay"):
        value: float = getattr(message.optimizer, what)
        if not 0 <= value < math.inf:
            raise WireError(f"the optimizer's {what} is {value}: it must be a number, 0 or above")
    if 0 < message.optimizer.decay_steps <= message.optimizer.warmup_steps:
        raise WireError(
            f"the optimizer's warmup_steps are {message.optimizer.warmup_steps}: they must be fewer than its decay_steps,"
            f" {message.optimizer.decay_steps}"
        )
    if message.dtype not in FORMATS:
        raise WireError(f"unknown dtype '{message.dtype}' of activations: {' and '.join(FORMATS)} are known")
    return SessionRequest(
        session=message.session,
        device=message.device,
        task=message.task,
        cut=message.cut,
        version=message.version,
        model_fingerprint=message.model_fingerprint,
        lora=lora_from_wire(message.lora),
        optimizer=OptimizerSpec(
            "adamw" if name == "adamw" else "sgd",
            message.optimizer.learning_rate,
            message.optimizer.weight_decay,
            message.optimizer.decay_steps,
            message.optimizer.warmup_steps,
        ),
        seed=message.seed,
        dtype=message.dtype,
        rank=message.rank,
        rules=rules_from_wire(message),
    )


def batch_to_wire(batch: CutBatch) -> list[RawTensor]:
    return [
        from_torch("activation", batch.activation),
        from_torch("attention_mask", batch.attention_mask),
        from_torch("labels", batch.labels),
    ]


def batch_from_wire(tensors: Sequence[RawTensor], hidden: int, dtype: str, per_token_labels: bool) -> CutBatch:
    """Raises `WireError` unless the three tensors have the dtypes and shapes of a batch of this model, and the mask 0s and 1s."""
    if len(tensors) != 3:
        raise WireError(f"a batch has the tensors activation, attention_mask and labels; {len(tensors)} came")
    activation, mask, labels = tensors
    require(activation, "activation", FORMATS[dtype], (None, None, hidden))
    require(mask, "attention_mask", tensor_pb2.INT64, activation.shape[:2])
    require(labels, "labels", tensor_pb2.INT64, activation.shape[:2] if per_token_labels else activation.shape[:1])
    batch = CutBatch(to_torch(activation), to_torch(mask), to_torch(labels))
    if ((batch.attention_mask != 0) & (batch.attention_mask != 1)).any():
        raise WireError("tensor 'attention_mask' holds values other than 0 and 1")
    return batch


def step_to_wire(result: StepResult) -> tuple[pb.StepDone, list[RawTensor]]:
    norms = [pb.LayerNorm(layer=layer, norm=norm) for layer, norm in sorted(result.layer_norms.items())]
    done = pb.StepDone(step=result.step, version=result.version, loss=result.loss, layer_norms=norms)
    return done, [from_torch("gradient", result.gradient)]


def step_from_wire(message: pb.StepDone, tensors: Sequence[RawTensor], like: torch.Tensor) -> StepResult:
    """Raises `WireError` unless the one tensor is a gradient for the activation `like`, and loss and norms are finite."""
    if len(tensors) != 1:
        raise WireError(f"a step's answer has one tensor, the gradient; {len(tensors)} came")
    require(tensors[0], "gradient", WIRE_DTYPE[like.dtype], tuple(like.shape))
    norms = {item.layer: item.norm for item in message.layer_norms}
    if not all(map(math.isfinite, (message.loss, *norms.values()))):
        raise DivergedError(f"the answer to step {message.step} holds a loss or a gradient norm that is not finite")
    return StepResult(message.step, message.version, message.loss, norms, to_torch(tensors[0]))


def evaluation_to_wire(result: Evaluation) -> tuple[pb.Evaluated, list[RawTensor]]:
    tensors = [] if result.logits is None else [from_torch("logits", result.logits)]
    return pb.Evaluated(loss=result.loss, count=result.count), tensors


def evaluation_from_wire(message: pb.Evaluated, tensors: Sequence[RawTensor], batch: int) -> Evaluation:
    """Raises `WireError` for logits of another shape than (batch, any)."""
    if not tensors:
        return Evaluation(message.loss, message.count, None)
    require(tensors[0], "logits", tensor_pb2.FLOAT32, (batch, None))
    return Evaluation(message.loss, message.count, to_torch(tensors[0]))
