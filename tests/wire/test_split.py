"""What device and edge say to each other, to the wire and back, and answers that do not fit the question."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from sfl.adapters.layout import LoraSpec
from sfl.errors import WireError
from sfl.v1 import split_pb2 as pb
from sfl.v1.federation_pb2 import UploadPolicy
from sfl.wire.split import (
    Evaluation,
    OptimizerSpec,
    SessionRequest,
    StepResult,
    StepTerms,
    TrainingRules,
    evaluation_from_wire,
    evaluation_to_wire,
    open_from_wire,
    open_to_wire,
    rules_from_wire,
    step_from_wire,
    step_request,
    step_to_wire,
    terms_from_wire,
)

REQUEST = SessionRequest(
    "device-1-ab",
    "device-1",
    "causal-lm",
    3,
    7,
    "f" * 64,
    LoraSpec(8, 16.5, 0.1, ("q", "v")),
    OptimizerSpec("sgd", 0.3, 0.01),
    2**63 - 1,
    "bf16",
    4,
    TrainingRules(0.1, ("A",), fresh_optimizer=True, shared_edge_adapter=True),
)


@pytest.mark.parametrize("request_", [REQUEST, replace(REQUEST, rank=0, rules=TrainingRules())])
def test_a_session_request_survives(request_: SessionRequest) -> None:
    assert open_from_wire(pb.Open.FromString(open_to_wire(request_).SerializeToString())) == request_


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proximal": math.nan}, "mu is nan: it must be a number, 0 or above"),
        ({"proximal": -0.1}, "mu is -0.1"),
        ({"proximal": math.inf}, "mu is inf"),
        ({"frozen_parts": ["A", "B"]}, "the parts A, B of the factors cannot be frozen together"),
        ({"frozen_parts": ["weight"]}, "the parts weight of the factors"),
    ],
)
def test_rules_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    for kind in (pb.Open, UploadPolicy):
        with pytest.raises(WireError, match=message):
            rules_from_wire(kind(**changes))


def test_rules_are_the_policys() -> None:
    policy = UploadPolicy(proximal=0.5, frozen_parts=["A", "A"], shared_edge_adapter=True, keep_progress=True)
    assert rules_from_wire(policy) == TrainingRules(0.5, ("A",), shared_edge_adapter=True)
    assert rules_from_wire(UploadPolicy()) == TrainingRules()


@pytest.mark.parametrize("factor", [1.0, 0.5, 2.0])
def test_a_factor_on_the_rate_survives_and_1_takes_no_bytes(factor: float) -> None:
    message = step_request(3, 2, StepTerms(factor))
    assert terms_from_wire(pb.Step.FromString(message.SerializeToString())) == StepTerms(factor)
    assert (message.ByteSize() == pb.Step(step=3, version=2).ByteSize()) == (factor == 1)


@pytest.mark.parametrize("factor", [-1.0, math.nan, math.inf])
def test_a_factor_on_the_rate_that_cannot_be(factor: float) -> None:
    with pytest.raises(WireError, match="the factor on the learning rate of step 4 is"):
        terms_from_wire(pb.Step(step=4, learning_rate_factor=factor))


def test_the_logits_offsets_survive() -> None:
    message = step_request(3, 2, StepTerms(1.0, (0.5, -8.0)))
    assert terms_from_wire(pb.Step.FromString(message.SerializeToString())).logit_offsets == (0.5, -8.0)
    with pytest.raises(WireError, match="the logits' offsets of step 4 are"):
        terms_from_wire(pb.Step(step=4, logit_offsets=[0.0, math.nan]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_steps_answer_survives(dtype: torch.dtype) -> None:
    like = torch.zeros(2, 3, 4, dtype=dtype)
    result = StepResult(4, 1, 0.123456789, {2: 0.5, 1 << 20: 1e-9}, torch.randn(2, 3, 4).to(dtype))
    message, tensors = step_to_wire(result)
    back = step_from_wire(pb.StepDone.FromString(message.SerializeToString()), tensors, like)
    assert (back.step, back.version, back.loss, back.layer_norms) == (4, 1, 0.123456789, {2: 0.5, 1 << 20: 1e-9})
    assert torch.equal(back.gradient, result.gradient)
    for other in (torch.zeros(2, 3, 5, dtype=dtype), torch.zeros(2, 3, 4, dtype=torch.float16)):
        with pytest.raises(WireError, match="'gradient' has"):
            step_from_wire(message, tensors, other)
    for wrong in ([], tensors * 2):
        with pytest.raises(WireError, match="one tensor, the gradient"):
            step_from_wire(message, wrong, like)


@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"layer_norms": {2: math.inf}}])
def test_a_steps_answer_that_is_not_finite(changes: dict[str, Any]) -> None:
    like = torch.zeros(2, 3, 4)
    message, tensors = step_to_wire(replace(StepResult(4, 1, 0.5, {2: 0.5}, like), **changes))
    with pytest.raises(WireError, match="the answer to step 4 holds a loss or a gradient norm that is not finite"):
        step_from_wire(message, tensors, like)


def test_an_evaluation_survives() -> None:
    for logits in (None, torch.randn(5, 3)):
        message, tensors = evaluation_to_wire(Evaluation(0.7, 5, logits))
        back = evaluation_from_wire(message, tensors, 5)
        assert (back.loss, back.count) == (0.7, 5)
        assert (back.logits is None) == (logits is None)
        if logits is not None and back.logits is not None:
            assert torch.equal(back.logits, logits)
            with pytest.raises(WireError, match="shape 5x3, expected 6x"):
                evaluation_from_wire(message, tensors, 6)
