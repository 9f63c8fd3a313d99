"""The device's trainer: what it does with the edge's answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sfl.data.batches import Batch
from sfl.device.trainer import DeviceTrainer
from sfl.edge_server.engine import EdgeEngine, Session
from sfl.errors import WireError
from sfl.wire.split import ORDINARY, CutBatch, Evaluation, StepResult, StepTerms
from tests.edge_server.made import Halves


class DirectEdge:
    """An engine, called directly; `changes` are made to its answers to steps."""

    def __init__(self, engine: EdgeEngine, session: Session) -> None:
        self.changes: dict[str, Any] = {}
        self._engine = engine
        self._session = session

    def begin(self, session: str, version: int, last_step: int = 0, checkpoint: int = 0) -> None:
        """It has begun."""

    def step(self, step: int, version: int, batch: CutBatch, terms: StepTerms = ORDINARY, checkpoint: int = 0) -> StepResult:
        return replace(self._engine.step(self._session, step, version, batch, terms), **self.changes)

    def evaluate(self, version: int, batch: CutBatch) -> Evaluation:
        return self._engine.evaluate(self._session, version, batch)

    def submit(self, submission: str, version: int, checkpoint: int = 0) -> None:
        self._engine.take_progress(self._session, submission, version)

    def adopt(self, version: int, keep_progress: bool, checkpoint: int = 0) -> None:
        raise NotImplementedError


def batch(size: int, seed: int) -> Batch:
    chance = np.random.default_rng(seed)
    ids = chance.integers(4, 100, (size, 6))
    return Batch(ids, np.ones_like(ids), chance.integers(0, 3, size))


def made() -> tuple[DeviceTrainer, DirectEdge]:
    halves = Halves()
    link = DirectEdge(halves.engine, halves.engine.open(halves.request(), halves.initial))
    half, adapter = halves.device(cut=2)
    return DeviceTrainer(half, adapter, link, "classification"), link


def test_norms_come_from_both_halves() -> None:
    trainer, _ = made()
    trainer.step(1, batch(4, 0))
    result = trainer.step(2, batch(4, 1))
    assert sorted(result.layer_norms) == [0, 1, 2, 3, 1 << 20]
    assert all(norm > 0 for norm in result.layer_norms.values())


@pytest.mark.parametrize("changes", [{"step": 2}, {"version": 1}])
def test_an_answer_to_another_question_trains_nothing(changes: dict[str, int]) -> None:
    trainer, link = made()
    link.changes = changes
    before = trainer.adapter.values()
    with pytest.raises(WireError, match="step 1 of version 0 was asked"):
        trainer.step(1, batch(4, 0))
    assert all(np.array_equal(before[key], value) for key, value in trainer.adapter.values().items())


def test_an_evaluation_over_batches_of_any_sizes_is_that_of_all_examples() -> None:
    trainer, _ = made()
    trainer.step(1, batch(4, 0))
    parts = [batch(5, 1), batch(2, 2), batch(1, 3)]
    one = Batch(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("input_ids", "attention_mask", "labels")))
    apart, together = trainer.evaluate(parts), trainer.evaluate([one])
    assert apart.count == together.count == 8
    assert apart.loss == pytest.approx(together.loss, rel=1e-5)
    assert (apart.accuracy, apart.f1_macro) == (together.accuracy, together.f1_macro)
    assert torch.is_grad_enabled()
