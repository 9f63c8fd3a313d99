"""A device's run: in which order it trains, uploads, waits, adopts and evaluates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.data.batches import Batch
from sfl.device.run import DeviceRun, Progress, RunPlan
from sfl.device.trainer import DeviceTrainer, Figures, TrainedStep
from sfl.errors import DataError
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2 import DEVICE, Periodic, Triggered, UpdateHeader, UploadPolicy
from tests.metrics import events

STATE: AdapterState = {AdapterKey(0, "q", "A"): np.ones((2, 3), dtype="f4")}
SIZES = [4, 4, 2]  # of the batches, over and over


class Diary:
    """Trainer and federation in one, which write down what they are asked; each step's gradient norm is told."""

    def __init__(self, norms: Iterable[float] = ()) -> None:
        self.adapter = SimpleNamespace(version=0)
        self.newest: int | None = 0
        self.finished = False
        self.said: list[str] = []
        self.headers: list[UpdateHeader] = []
        self._norms = iter(norms)

    def step(self, step: int, batch: Batch) -> TrainedStep:
        self.said.append(f"step {step}")
        return TrainedStep(1.0, {0: next(self._norms, 1.0)})

    def evaluate(self, batches: Iterable[Batch]) -> Figures:
        count = len(list(batches))
        self.said.append(f"evaluate {count}")
        return Figures(1.0, count, 0.5, 0.5) if count else Figures(0.0, 0, None, None)

    def take_progress(self, submission: str) -> AdapterState:
        self.said.append(f"take {submission}")
        return STATE

    def adopt(self, version: int, state: AdapterState, keep_progress: bool) -> None:
        self.said.append(f"adopt {version}{' and keep' if keep_progress else ''}")
        self.adapter.version = version

    def fetch(self, version: int, first_layer: int = 0, last_layer: int = 0) -> AdapterState:
        self.said.append(f"fetch {version} [{first_layer}, {last_layer})")
        return STATE

    def submit(self, header: UpdateHeader, state: AdapterState) -> None:
        assert state is STATE
        self.said.append("submit")
        self.headers.append(header)


def made(diary: Diary, policy: UploadPolicy, steps: int, out: Path | None = None, **changes: Any) -> DeviceRun:
    def batch(size: int) -> Batch:
        ids = np.ones((size, 3), dtype="i8")
        return Batch(ids, ids, np.zeros(size, dtype="i8"))

    plan = RunPlan(
        device="device-1",
        session="device-1-ab",
        cut=2,
        steps=steps,
        batches=(batch(SIZES[i % 3]) for i in range(1000)),
        validation=lambda: [batch(1)] * 2,
        test=lambda: [batch(1)] * 5,
    )
    plan = replace(plan, **changes)
    return DeviceRun(plan, cast(DeviceTrainer, diary), policy, diary, MetricsWriter(out and out / "metrics.jsonl"))


def rounds(**changes: Any) -> UploadPolicy:
    return UploadPolicy(**{"final_upload": True, "periodic": Periodic(local_steps=2), **changes})


def test_fedavg_waits_after_each_round_and_not_at_the_end(tmp_path: Path) -> None:
    diary = Diary()
    run = iter(made(diary, rounds(), 5, tmp_path))
    assert [next(run) for _ in range(4)] == [Progress.TRAINED, Progress.TRAINED, Progress.WAITING, Progress.WAITING]
    assert diary.said == ["step 1", "step 2", "take device-1-ab/1", "submit"]
    diary.newest = 1
    assert [next(run) for _ in range(3)] == [Progress.TRAINED, Progress.TRAINED, Progress.WAITING]
    diary.newest = 2
    assert list(run) == [Progress.TRAINED]
    assert diary.said[4:] == [
        *("fetch 1 [0, 2)", "adopt 1", "step 3", "step 4", "take device-1-ab/2", "submit"),
        *("fetch 2 [0, 2)", "adopt 2", "step 5", "take device-1-ab/3", "submit", "evaluate 5"),
    ]
    assert [(h.submission, h.version, h.steps, h.examples, h.half) for h in diary.headers] == [
        ("device-1-ab/1", 0, 2, 8, DEVICE),
        ("device-1-ab/2", 1, 2, 6, DEVICE),
        ("device-1-ab/3", 2, 1, 4, DEVICE),
    ]
    assert [(e["step"], e["version"], e["examples"]) for e in events(tmp_path, "step")] == [
        (1, 0, 4),
        (2, 0, 4),
        (3, 1, 2),
        (4, 1, 4),
        (5, 2, 4),
    ]
    assert [e["trigger"] for e in events(tmp_path, "submit")] == ["round", "round", "final"]
    assert [e["version"] for e in events(tmp_path, "adopt")] == [1, 2]
    assert [e["split"] for e in events(tmp_path, "eval")] == ["test"]


def test_a_round_that_ends_with_the_run_is_submitted_once_and_not_waited_for() -> None:
    diary = Diary()
    assert list(made(diary, rounds(), 2)) == [Progress.TRAINED] * 2
    assert diary.said == ["step 1", "step 2", "take device-1-ab/1", "submit", "evaluate 5"]


def test_without_a_final_upload_the_rest_stays() -> None:
    diary = Diary()
    assert list(made(diary, rounds(final_upload=False), 1)) == [Progress.TRAINED]
    assert diary.said == ["step 1", "evaluate 5"]


def test_nobody_waits_for_a_federation_that_has_finished() -> None:
    diary = Diary()
    diary.finished = True
    assert Progress.WAITING not in list(made(diary, rounds(), 6))


@pytest.mark.parametrize("keep", [True, False])
def test_gsfs_never_waits_and_adopts_between_two_steps(keep: bool) -> None:
    diary = Diary([1.0, 2.0, 1.5, 1.5, 9.0, 1.0])
    policy = UploadPolicy(
        keep_progress=keep,
        final_upload=True,
        triggered=Triggered(alpha=0.5, beta=1, min_steps=2, validate_every=3, threshold=0.5, metric="loss"),
    )
    run = iter(made(diary, policy, 6))
    found = [next(run), next(run), next(run)]
    diary.newest = 4  # versions 1 to 3 came and went
    found += list(run)
    assert found == [Progress.TRAINED] * 6
    adoption = ["fetch 4 [0, 2)", "adopt 4 and keep" if keep else "adopt 4", "evaluate 2"]
    assert diary.said == [
        *("evaluate 2", "step 1", "step 2", "take device-1-ab/1", "submit", "step 3", *adoption, "step 4", "evaluate 2"),
        *("step 5", "take device-1-ab/2", "submit", "step 6", "take device-1-ab/3", "submit", "evaluate 5"),
    ]
    assert [(h.version, h.steps, h.examples) for h in diary.headers] == [(0, 2, 8), (4, 3, 10), (4, 1, 2)]
    assert made(diary, policy, 0).totals()["version"] == 4


def test_a_policy_that_validates_needs_something_to_validate_on() -> None:
    diary = Diary()
    policy = UploadPolicy(triggered=Triggered(alpha=0.5, beta=1, min_steps=2, validate_every=3, threshold=0.5, metric="loss"))
    with pytest.raises(DataError, match=r"device-1 has nothing for it: set `data.validation` above 0"):
        list(made(diary, policy, 3, validation=list))
    assert diary.said == ["evaluate 0"]


def test_an_evaluation_over_nothing_is_not_reported(tmp_path: Path) -> None:
    list(made(Diary(), rounds(), 1, tmp_path, test=list))
    assert not events(tmp_path, "eval")
