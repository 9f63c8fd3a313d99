"""Predicted bytes against the frames of a real step."""

from __future__ import annotations

import pytest
import torch

from sfl.data.settings import Task
from sfl.model.precision import DTYPES
from sfl.planning.step_bytes import step_bytes
from sfl.settings import Compute
from sfl.v1 import split_pb2 as pb
from sfl.wire.frames import CHUNK_BYTES, Traffic, frames
from sfl.wire.split import CutBatch, StepResult, batch_to_wire, step_to_wire
from tests.edge_server.made import Halves


def sent(message: pb.DeviceMessage | pb.EdgeMessage, tensors: list) -> int:
    traffic = Traffic()
    for _ in frames(message, tensors, traffic):
        pass
    return traffic.sent


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_a_real_step_of_a_tiny_model(task: Task) -> None:
    edge = Halves(family="opt", task=task)
    session = edge.engine.open(edge.request(cut=2, version=1), edge.initial)
    batch = edge.batch(size=3, tokens=6)
    result = edge.engine.step(session, 1, 1, batch)
    done, tensors = step_to_wire(result)
    predicted = step_bytes("fp32", task, 3, 6, 32, 2, 4)
    assert predicted.up == sent(pb.DeviceMessage(step=pb.Step(step=1, version=1)), batch_to_wire(batch))
    assert predicted.down == sent(pb.EdgeMessage(step=done), tensors)


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(("batch", "length", "hidden"), [(4, 128, 1024), (1, 128, CHUNK_BYTES // 512), (5, 77, 768)])
def test_steps_of_more_than_one_chunk(compute: Compute, batch: int, length: int, hidden: int) -> None:
    activation = torch.zeros(batch, length, hidden, dtype=DTYPES[compute])
    mask = torch.ones(batch, length, dtype=torch.int64)
    up = sent(
        pb.DeviceMessage(step=pb.Step(step=1, version=1)),
        batch_to_wire(CutBatch(activation, mask, torch.zeros(batch, dtype=torch.int64))),
    )
    done, tensors = step_to_wire(StepResult(1, 1, 0.5, {3: 1.0, 1 << 20: 2.0}, activation))
    down = sent(pb.EdgeMessage(step=done), tensors)
    assert step_bytes(compute, "classification", batch, length, hidden, 3, 4) == (up, down)
