"""A device's run: in which order it trains, uploads, waits, adopts and evaluates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.data.batches import Batch
from sfl.device.link_meter import LinkMeter
from sfl.device.run import DeviceRun, Progress
from sfl.device.run_plan import RunPlan
from sfl.device.trainer import DeviceTrainer, Figures, TrainedStep
from sfl.errors import DataError, SessionLostError
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2 import (
    DEVICE,
    Feedback,
    NetworkSense,
    Periodic,
    Triggered,
    UpdateHeader,
    UploadPolicy,
)
from sfl.wire.split import StepTerms
from tests.metrics import events

STATE: AdapterState = {AdapterKey(0, "q", "A"): np.ones((2, 3), dtype="f4")}
SIZES = [4, 4, 2]  # of the batches, over and over


class Diary:
    """Trainer and federation in one, which write down what they are asked; each step's gradient norm is told.

    A step takes `step_s` on the `clock`. Validations find the `losses`, in turn, and 1 after the last one.
    """

    def __init__(self, norms: Iterable[float] = (), losses: Iterable[float] = (), step_s: float = 0.0) -> None:
        self.adapter = SimpleNamespace(version=0, take_progress=lambda: STATE, adopt=self._adopt, begin=lambda *now: None)
        self.edge = SimpleNamespace(submit=self._take, adopt=lambda *request: None, look=self._look, begin=self._begin)
        self.lost = False  # what the edge knew of this device
        self.whole = True  # submissions, once this half is there
        self.newest: int | None = 0
        self.at_server: int | None = None  # the newest version, if it has not heard of that yet
        self.finished = False
        self.policy: UploadPolicy | None = None
        self.said: list[str] = []
        self.headers: list[UpdateHeader] = []
        self.rate_factors: list[float] = []
        self.offsets: list[tuple[float, ...]] = []
        self._norms = iter(norms)
        self._losses = iter(losses)
        self._step_s = step_s
        self._now = 0.0

    def clock(self) -> float:
        return self._now

    def step(self, step: int, batch: Batch, terms: StepTerms, checkpoint: int = 0) -> TrainedStep:
        self.said.append(f"step {step}")
        self.rate_factors.append(terms.rate_factor)
        self.offsets.append(terms.logit_offsets)
        self._now += self._step_s
        return TrainedStep(1.0, {0: next(self._norms, 1.0)})

    def evaluate(self, batches: Iterable[Batch]) -> Figures:
        count = len(list(batches))
        self.said.append(f"evaluate {count}")
        return Figures(next(self._losses, 1.0), count, 0.5, 0.5) if count else Figures(0.0, 0, None, None)

    def _look(self) -> None:
        if self.lost:
            raise SessionLostError("the edge has lost its disk")

    def _begin(self, session: str, version: int, last_step: int, checkpoint: int) -> None:
        self.said.append(f"begin at step {last_step}")
        self.lost = False

    def _take(self, submission: str, version: int, checkpoint: int) -> None:
        self.said.append(f"take {submission}")

    def _adopt(self, state: AdapterState, version: int, keep_progress: bool) -> None:
        self.said.append(f"adopt {version}{' and keep' if keep_progress else ''}")
        self.adapter.version = version

    def fetch_newest(self, last_layer: int) -> tuple[int, AdapterState]:
        newest = self.at_server or self.newest or 0
        self.said.append(f"fetch {newest} [0, {last_layer})")
        return newest, STATE

    def submit(self, header: UpdateHeader, state: AdapterState) -> bool:
        assert state is STATE
        self.said.append("submit")
        self.headers.append(header)
        return self.whole

    def trained(self) -> None:
        self.said.append("trained")


def made(
    diary: Diary, policy: UploadPolicy, steps: int, out: Path | None = None, uplink: LinkMeter | None = None, **changes: Any
) -> DeviceRun:
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
    metrics = MetricsWriter(out and out / "metrics.jsonl")
    return DeviceRun(plan, cast(DeviceTrainer, diary), policy, diary, metrics, uplink=uplink, clock=diary.clock)


def rounds(**changes: Any) -> UploadPolicy:
    return UploadPolicy(**{"final_upload": True, "periodic": Periodic(local_steps=2), **changes})


@pytest.mark.parametrize("whole", [True, False])
def test_an_edge_that_loses_its_disk_while_a_version_is_waited_for_is_noticed(whole: bool) -> None:
    diary = Diary()
    run = iter(made(diary, rounds(), 5))
    assert [next(run) for _ in range(3)] == [Progress.TRAINED, Progress.TRAINED, Progress.WAITING]
    diary.lost, diary.whole = True, whole  # whether the federation server had the edge's half by then
    assert next(run) is (Progress.WAITING if whole else Progress.TRAINED)
    said = ["submit", "fetch 0 [0, 2)", "begin at step 2"]
    assert diary.said[4:] == (said if whole else [*said, "step 3"])


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
        *("fetch 2 [0, 2)", "adopt 2", "step 5", "take device-1-ab/3", "submit", "trained", "evaluate 5"),
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
    assert diary.said == ["step 1", "step 2", "take device-1-ab/1", "submit", "trained", "evaluate 5"]


def test_without_a_final_upload_the_rest_stays() -> None:
    diary = Diary()
    assert list(made(diary, rounds(final_upload=False), 1)) == [Progress.TRAINED]
    assert diary.said == ["step 1", "trained", "evaluate 5"]


def test_nobody_waits_for_a_federation_that_has_finished() -> None:
    diary = Diary()
    diary.finished = True
    assert Progress.WAITING not in list(made(diary, rounds(), 6))


@pytest.mark.parametrize("keep", [True, False])
def test_gsfs_never_waits_and_adopts_between_two_steps(tmp_path: Path, keep: bool) -> None:
    diary = Diary([1.0, 2.0, 1.5, 1.5, 9.0, 1.0])
    policy = UploadPolicy(
        keep_progress=keep,
        final_upload=True,
        triggered=Triggered(alpha=0.5, beta=1, min_steps=2, validate_every=3, threshold=0.5, metric="loss"),
    )
    run = iter(made(diary, policy, 6, tmp_path))
    found = [next(run), next(run), next(run)]
    diary.newest = 4  # versions 1 to 3 came and went
    found += list(run)
    assert found == [Progress.TRAINED] * 6
    adoption = ["fetch 4 [0, 2)", "adopt 4 and keep" if keep else "adopt 4", "evaluate 2"]
    assert diary.said == [
        *("evaluate 2", "step 1", "step 2", "take device-1-ab/1", "submit", "step 3", *adoption, "step 4", "evaluate 2"),
        *("step 5", "take device-1-ab/2", "submit", "step 6", "take device-1-ab/3", "submit", "trained", "evaluate 5"),
    ]
    second = (4, 3, 10) if keep else (4, 2, 8)  # step 3, of 2 examples, was before the adoption
    assert [(h.version, h.steps, h.examples) for h in diary.headers] == [(0, 2, 8), second, (4, 1, 2)]
    assert [event["dropped_steps"] for event in events(tmp_path, "adopt")] == [0 if keep else 1]
    assert made(diary, policy, 0).totals()["version"] == 4


def test_who_adopts_after_uploads_alone_finishes_its_steps_first(tmp_path: Path) -> None:
    diary = Diary()
    every = Triggered(alpha=0.5, beta=9, min_steps=3, max_steps=3)
    policy = UploadPolicy(final_upload=True, adopt_after_upload=True, triggered=every)
    run = iter(made(diary, policy, 7, tmp_path))
    next(run)
    diary.newest = 1
    list(run)
    assert diary.said == [
        *("step 1", "step 2", "step 3", "take device-1-ab/1", "submit", "fetch 1 [0, 2)", "adopt 1"),
        *("step 4", "step 5", "step 6", "take device-1-ab/2", "submit", "step 7", "take device-1-ab/3", "submit", "trained"),
        "evaluate 5",
    ]
    assert [(h.version, h.steps) for h in diary.headers] == [(0, 3), (1, 3), (1, 1)]
    assert [event["dropped_steps"] for event in events(tmp_path, "adopt")] == [0]


def test_uploads_are_as_far_apart_as_the_policy_says_that_was_announced_last(tmp_path: Path) -> None:
    def every(steps: int, keep: bool = True) -> UploadPolicy:
        return UploadPolicy(keep_progress=keep, triggered=Triggered(alpha=0.5, beta=9, min_steps=steps, max_steps=steps))

    diary = Diary()
    run = iter(made(diary, every(5), 20, tmp_path))
    for _ in range(3):
        next(run)
    diary.policy = every(2, keep=False)
    assert next(run) == Progress.TRAINED and uploads_at(tmp_path) == [4], "between two steps, and at once if it is time"
    next(run)
    diary.policy, diary.newest = every(4), 1
    list(run)
    assert uploads_at(tmp_path) == [4, 8, 12, 16, 20]
    assert [event["dropped_steps"] for event in events(tmp_path, "adopt")] == [0], "the rest is as it was at the start"


def test_the_logits_offsets_are_those_that_were_announced_last(tmp_path: Path) -> None:
    diary = Diary()
    run = iter(made(diary, rounds(), 4, tmp_path))
    next(run)
    diary.finished, diary.policy = True, UploadPolicy(logit_offsets=[0.5, -2])
    list(run)
    assert diary.offsets == [(), (0.5, -2), (0.5, -2), (0.5, -2)]


def test_what_is_adopted_is_the_newest_version_at_the_server(tmp_path: Path) -> None:
    """The one that the device has heard of may have been removed there."""
    diary = Diary()
    diary.newest, diary.at_server = 2, 4
    policy = UploadPolicy(keep_progress=True, final_upload=True, triggered=Triggered(alpha=0.5, beta=9, min_steps=9))
    list(made(diary, policy, 2, tmp_path))
    assert diary.said[:4] == ["fetch 4 [0, 2)", "adopt 4 and keep", "step 1", "step 2"]
    assert [event["version"] for event in events(tmp_path, "adopt")] == [4] and diary.headers[0].version == 4


def test_rounds_are_what_they_were_at_the_start(tmp_path: Path) -> None:
    diary = Diary()
    diary.finished, diary.policy = True, UploadPolicy(triggered=Triggered(min_steps=1, max_steps=1))
    list(made(diary, rounds(), 6, tmp_path))
    assert uploads_at(tmp_path) == [2, 4, 6]


def test_what_an_adoption_dropped_is_not_submitted() -> None:
    diary = Diary()
    policy = UploadPolicy(final_upload=True, triggered=Triggered(alpha=0.5, beta=9, min_steps=9))
    run = iter(made(diary, policy, 2))
    next(run)
    diary.newest = 1
    list(run)
    assert [(h.version, h.steps, h.examples) for h in diary.headers] == [(1, 1, 4)]


def test_a_policy_that_validates_needs_something_to_validate_on() -> None:
    diary = Diary()
    policy = UploadPolicy(triggered=Triggered(alpha=0.5, beta=1, min_steps=2, validate_every=3, threshold=0.5, metric="loss"))
    with pytest.raises(DataError, match=r"device-1 has nothing for it: set `data.validation` above 0"):
        list(made(diary, policy, 3, validation=list))
    assert diary.said == ["evaluate 0"]


def test_an_evaluation_over_nothing_is_not_reported(tmp_path: Path) -> None:
    list(made(Diary(), rounds(), 1, tmp_path, test=list))
    assert not events(tmp_path, "eval")


class LinkedDiary(Diary):
    """Whose uploads take `seconds` each and are told to `uplink`, as the federation's client does."""

    def __init__(self, seconds: float, step_s: float, norms: Iterable[float]) -> None:
        super().__init__(norms, step_s=step_s)
        self.uplink = LinkMeter()
        self.seconds = seconds
        self.failures = 0

    def submit(self, header: UpdateHeader, state: AdapterState) -> bool:
        super().submit(header, state)
        self.uplink.uploaded(24, self.seconds, self.failures)  # 2 x 3 floats
        return True


def sensing(**changes: Any) -> UploadPolicy:
    network = NetworkSense(budget=0.1, lowest=0.5, highest=4)
    return UploadPolicy(triggered=Triggered(**{"alpha": 0.5, "beta": 0.1, "min_steps": 4, "network": network, **changes}))


def uploads_at(folder: Path) -> list[int]:
    return [event["step"] for event in events(folder, "submit")]


GROWING = [2.0**step for step in range(60)]  # each norm but the first fires


@pytest.mark.parametrize(
    ("seconds", "factor", "distance"),
    [(0.4, 1.0, 4), (0.8, 2.0, 8), (0.41, 1.025, 5), (40.0, 4.0, 16), (0.3, 0.75, 3), (0.001, 0.5, 2)],
)
def test_uploads_are_as_far_apart_as_the_link_asks_for(tmp_path: Path, seconds: float, factor: float, distance: int) -> None:
    # 4 steps of 1 s at a budget of a tenth: 0.4 s of upload are what is allowed at the set distance.
    diary = LinkedDiary(seconds, 1.0, GROWING)
    list(made(diary, sensing(), 4 + 2 * distance, tmp_path, diary.uplink))
    assert uploads_at(tmp_path) == [4, 4 + distance, 4 + 2 * distance]  # nothing is known of the link before the first
    first, *others = events(tmp_path, "submit")
    assert first["threshold_factor"] == 1
    assert "predicted_s" not in first
    for event in others:
        assert event["threshold_factor"] == pytest.approx(factor)
        assert event["predicted_s"] == event["upload_s"] == seconds
    assert {event["bytes_per_s"] for event in (first, *others)} == {round(24 / seconds)}
    assert not diary.headers[0].HasField("link")
    assert diary.headers[1].link.bytes_per_s == pytest.approx(24 / seconds)


def test_a_link_that_becomes_good_brings_uploads_closer(tmp_path: Path) -> None:
    diary = LinkedDiary(1.2, 1.0, GROWING)
    run = iter(made(diary, sensing(), 60, tmp_path, diary.uplink))
    for _ in range(20):
        next(run)
    diary.seconds = 0.2
    list(run)
    found = uploads_at(tmp_path)
    distances = [later - earlier for earlier, later in pairwise(found)]
    assert distances[0] == 12
    assert distances[-1] == 2
    assert distances == sorted(distances, reverse=True)


def test_what_failures_took_holds_uploads_back(tmp_path: Path) -> None:
    diary = LinkedDiary(0.4, 1.0, GROWING)
    diary.failures, diary.seconds = 2, 1.2  # tries of 0.4 s each
    list(made(diary, sensing(), 30, tmp_path, diary.uplink))
    assert uploads_at(tmp_path) == [4, 16, 28]
    assert [event["failures"] for event in events(tmp_path, "submit")] == [2, 2, 2]


@pytest.mark.parametrize("seconds", [0.001, 40.0])
def test_a_policy_that_does_not_sense_the_network_knows_no_link(tmp_path: Path, seconds: float) -> None:
    diary = LinkedDiary(seconds, 1.0, GROWING)
    policy = sensing()
    policy.triggered.ClearField("network")
    list(made(diary, policy, 20, tmp_path, diary.uplink))
    assert uploads_at(tmp_path) == [4, 8, 12, 16, 20]
    assert {event["threshold_factor"] for event in events(tmp_path, "submit")} == {1}
    assert diary.headers[1].HasField("link")  # the federation server may want to know all the same


def test_rounds_know_no_link(tmp_path: Path) -> None:
    diary = LinkedDiary(40.0, 1.0, ())
    diary.finished = True
    list(made(diary, rounds(), 6, tmp_path, diary.uplink))
    assert uploads_at(tmp_path) == [2, 4, 6]


def test_a_device_that_never_triggers_uploads_all_the_same(tmp_path: Path) -> None:
    diary = Diary()  # its norms are all equal
    list(made(diary, sensing(max_steps=7), 25, tmp_path))
    assert uploads_at(tmp_path) == [7, 14, 21]
    assert {event["trigger"] for event in events(tmp_path, "submit")} == {"overdue"}
    assert [header.steps for header in diary.headers] == [7, 7, 7]


def test_a_slow_link_puts_the_last_step_off_by_its_factor_and_no_more(tmp_path: Path) -> None:
    for seconds, found in ((0.8, [7, 21, 35]), (1000.0, [7, 35]), (0.001, [7, 14, 21, 28, 35])):
        diary = LinkedDiary(seconds, 1.0, ())
        list(made(diary, sensing(max_steps=7), 36, tmp_path / str(seconds), diary.uplink))
        assert uploads_at(tmp_path / str(seconds)) == found


def test_the_learning_rate_follows_local_validations(tmp_path: Path) -> None:
    policy = UploadPolicy(
        triggered=Triggered(alpha=0.5, beta=9, min_steps=1, validate_every=2, threshold=99, metric="loss"),
        feedback=Feedback(decrease=0.5, increase=1.5, lowest=0.3, patience=1, margin=0.1),
    )
    policy.triggered.threshold_decay = policy.triggered.threshold_growth = 1
    diary = Diary(losses=[1.0, 1.2, 1.05, 1.3, 0.9, 0.8])  # before step 1 and after steps 2, 4, ...
    list(made(diary, policy, 12, tmp_path))
    by_hand = [1, 1, 0.5, 0.5, 0.5, 0.5, 0.3, 0.3, 0.45, 0.45, 0.675, 0.675]
    assert diary.rate_factors == pytest.approx(by_hand)
    assert [event.get("rate_factor", 1) for event in events(tmp_path, "step")] == pytest.approx(by_hand)
    assert "rate_factor" not in events(tmp_path, "step")[0]


def test_an_adoption_is_a_look_at_performance_too() -> None:
    policy = UploadPolicy(
        triggered=Triggered(alpha=0.5, beta=9, min_steps=1, validate_every=99, threshold=99, metric="loss"),
        feedback=Feedback(decrease=0.5, increase=1, lowest=0.1, patience=1, margin=0),
    )
    diary = Diary(losses=[1.0, 2.0])
    run = iter(made(diary, policy, 3))
    next(run)
    diary.newest = 1
    list(run)
    assert diary.rate_factors == [1, 0.5, 0.5]
