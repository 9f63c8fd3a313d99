"""The edge engine without a network: sessions apart from each other, numbered steps, versions, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sfl.adapters.state import AdapterState, edge_half, total
from sfl.edge_server.engine import Session
from sfl.errors import AdapterError, ModelError, RefusedError, SflError, WireError
from sfl.model.local_adapter import LocalAdapter
from sfl.model.seeds import dropout_seed
from sfl.wire.split import OptimizerSpec
from tests.edge_server.made import Halves


@pytest.fixture(scope="module")
def halves() -> Halves:
    return Halves()


def open_session(halves: Halves, device: str = "device-1", cut: int = 2, **changes: Any) -> Session:
    return halves.engine.open(halves.request(device, cut, **changes), halves.initial)


def same(left: AdapterState, right: AdapterState) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


def losses(halves: Halves, session: Session, numbers: range) -> list[float]:
    return [halves.engine.step(session, number, session.adapter.version, halves.batch(number)).loss for number in numbers]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_session_does_not_feel_those_beside_it(dropout: float) -> None:
    alone, beside = Halves(dropout=dropout), Halves(dropout=dropout)
    session = open_session(alone)
    expected = losses(alone, session, range(1, 6))
    found = []
    torch.manual_seed(99)
    first, other = open_session(beside), open_session(beside, "device-2", cut=1, seed=8)
    for number in range(1, 6):
        found += losses(beside, first, range(number, number + 1))
        losses(beside, other, range(number, number + 1))
        beside.engine.evaluate(other, 0, beside.batch(7))
    assert found == expected
    assert same(first.adapter.values(), session.adapter.values())
    assert not same(first.adapter.values(), edge_half(alone.initial, 2))


def test_the_seed_of_a_session_decides_its_dropout() -> None:
    halves = Halves(dropout=0.5)
    first, second = (losses(halves, open_session(halves, seed=seed), range(1, 8)) for seed in (1, 2))
    again = losses(halves, open_session(halves, seed=1), range(1, 8))
    assert first == again
    assert first != second


def test_no_two_halves_draw_the_same_dropout() -> None:
    seeds = {
        dropout_seed(seed, name, half)
        for seed, name in ((1, "device-1"), (1, "device-2"), (2, "device-1"))
        for half in ("device", "edge")
    }
    assert len(seeds) == 6
    halves = Halves(dropout=0.5)
    first, second = (losses(halves, open_session(halves, name), range(1, 4)) for name in ("device-1", "device-2"))
    assert first != second
    states = [open_session(halves, name, seed=1).random_state["cpu"] for name in ("device-1", "device-2")]
    assert not torch.equal(*states)
    assert not torch.equal(states[0], torch.Generator().manual_seed(dropout_seed(1, "device-1", "device")).get_state())


@pytest.mark.parametrize("where", ["activation", "adapter"])
def test_gradients_that_are_not_finite_train_nothing(halves: Halves, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(halves, open_session(halves), range(1, 3))
    session = open_session(halves)
    before = session.adapter.values()
    with monkeypatch.context() as patched:
        if where == "adapter":
            patched.setattr(LocalAdapter, "layer_norms", lambda adapter: {2: math.nan})
        else:
            patched.setattr("sfl.edge_server.engine._gradient", lambda activation: torch.full_like(activation, math.inf))
        with pytest.raises(WireError, match="the gradients of step 1 are not finite: lower the learning rate"):
            halves.engine.step(session, 1, 0, halves.batch(1))
    assert same(session.adapter.values(), before)
    assert losses(halves, session, range(1, 3)) == expected


def test_a_step_asked_again_is_answered_alike_and_trains_nothing(halves: Halves) -> None:
    session = open_session(halves)
    losses(halves, session, range(1, 3))
    answer = halves.engine.step(session, 3, 0, halves.batch(3))
    before = session.adapter.values()
    again = halves.engine.step(session, 3, 0, halves.batch(3))
    assert again.loss == answer.loss
    assert torch.equal(again.gradient, answer.gradient)
    assert again.layer_norms == answer.layer_norms
    assert same(session.adapter.values(), before)


@pytest.mark.parametrize("number", [0, 1, 4, 2**40])
def test_a_step_out_of_turn(halves: Halves, number: int) -> None:
    session = open_session(halves)
    losses(halves, session, range(1, 3))
    before = session.adapter.values()
    with pytest.raises(WireError, match=f"step {number} of device-1 came, step 3 was due"):
        halves.engine.step(session, number, 0, halves.batch())
    assert same(session.adapter.values(), before)


def test_another_version_is_refused_everywhere(halves: Halves) -> None:
    session = open_session(halves)
    asks = (
        lambda: halves.engine.step(session, 1, 1, halves.batch()),
        lambda: halves.engine.evaluate(session, 1, halves.batch()),
        lambda: halves.engine.take_progress(session, "s/1", 1),
    )
    for ask in asks:
        with pytest.raises(WireError, match="asked with version 1, its half here stems from version 0: adopt first"):
            ask()
    assert session.last_step == 0


def test_layer_norms_are_those_of_the_edge_and_of_the_gradient(halves: Halves) -> None:
    session = open_session(halves, optimizer=OptimizerSpec("sgd", 0.5))
    before = session.adapter.values()
    result = halves.engine.step(session, 1, 0, halves.batch())
    after = session.adapter.values()
    for layer, norm in result.layer_norms.items():
        moved = math.sqrt(sum(float(((after[key] - before[key]) ** 2).sum()) for key in after if key.layer == layer))
        assert norm == pytest.approx(moved / 0.5, rel=1e-4)
    assert sorted(result.layer_norms) == sorted({key.layer for key in before})
    assert min(result.layer_norms) == 2
    assert result.gradient.shape == halves.batch().activation.shape
    assert result.gradient.abs().sum() > 0


def test_evaluation_trains_nothing_and_drops_nothing() -> None:
    halves = Halves(dropout=0.5)
    session = open_session(halves)
    losses(halves, session, range(1, 4))
    before = session.adapter.values()
    first, second = (halves.engine.evaluate(session, 0, halves.batch(9, size=5)) for _ in range(2))
    assert first.loss == second.loss
    assert first.count == 5
    assert first.logits is not None
    assert first.logits.shape == (5, 3)
    assert first.loss == pytest.approx(float(torch.nn.functional.cross_entropy(first.logits, halves.batch(9, size=5).labels)))
    assert same(session.adapter.values(), before)


def test_a_submission_asked_twice_takes_progress_once(halves: Halves) -> None:
    session = open_session(halves)
    start = session.adapter.values()
    losses(halves, session, range(1, 3))
    first = halves.engine.take_progress(session, "s/1", 0)
    assert same(halves.engine.take_progress(session, "s/1", 0), first)
    middle = session.adapter.values()
    assert same(first, {key: middle[key] - start[key] for key in start})
    losses(halves, session, range(3, 4))
    assert same(halves.engine.take_progress(session, "s/1", 0), first)  # also after another step
    second = halves.engine.take_progress(session, "s/2", 0)
    end = session.adapter.values()
    assert same(second, {key: end[key] - middle[key] for key in start})
    nothing = halves.engine.take_progress(session, "s/3", 0)
    assert all(not value.any() for value in nothing.values())


@pytest.mark.parametrize("keep", [True, False])
def test_adopt_is_the_global_version_and_what_was_not_sent(halves: Halves, keep: bool) -> None:
    session = open_session(halves)
    losses(halves, session, range(1, 3))
    halves.engine.take_progress(session, "s/1", 0)
    sent = session.adapter.values()
    losses(halves, session, range(3, 5))
    here = session.adapter.values()
    unsent = {key: here[key] - sent[key] for key in here}
    newer = {key: value + 1 for key, value in halves.initial.items()}
    halves.engine.adopt(session, 4, newer, keep)
    edge = edge_half(newer, 2)
    adopted = session.adapter.values()
    assert same(adopted, total(edge, unsent) if keep else edge)
    assert session.adapter.version == 4
    halves.engine.adopt(session, 4, halves.initial, keep)  # once more changes nothing, whatever comes with it
    assert same(session.adapter.values(), adopted)
    with pytest.raises(WireError, match="version 3 is older than 4, which device-1 has"):
        halves.engine.adopt(session, 3, newer, keep)
    assert same(session.adapter.values(), adopted)
    progress = halves.engine.take_progress(session, "s/2", 4)
    assert same(progress, {key: adopted[key] - edge[key] for key in edge})
    losses(halves, session, range(5, 6))


@pytest.mark.parametrize("keep", [True, False])
def test_adopt_on_the_device_does_the_same(halves: Halves, keep: bool) -> None:
    half, adapter = halves.device(cut=2)
    batch = halves.batch()

    def train() -> None:
        adapter.mount()
        half(torch.full((3, 6), 5), batch.attention_mask).square().mean().backward()
        adapter.step(0.01)

    train()
    adapter.take_progress()
    sent = adapter.values()
    train()
    unsent = {key: value - sent[key] for key, value in adapter.values().items()}
    assert any(value.any() for value in unsent.values())
    newer = {key: value + 1 for key, value in sent.items()}
    adapter.adopt(newer, 1, keep)
    assert same(adapter.values(), total(newer, unsent) if keep else newer)
    kept = adapter.take_progress()
    assert all(np.allclose(kept[key], unsent[key] if keep else 0, atol=1e-6) for key in kept)
    with pytest.raises(AdapterError, match="missing"):
        adapter.adopt({}, 2, keep)
    assert adapter.version == 1
    train()
    assert same(newer, {key: value + 1 for key, value in sent.items()})  # the arrays that it keeps are never changed


def test_a_failed_step_leaves_no_gradient_behind(halves: Halves, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses(halves, open_session(halves), range(1, 4))
    session = open_session(halves)
    found = losses(halves, session, range(1, 2))

    def out_of_memory(adapter: LocalAdapter) -> dict[int, float]:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(LocalAdapter, "layer_norms", out_of_memory)
        with pytest.raises(RuntimeError):
            halves.engine.step(session, 2, 0, halves.batch(17))
    assert found + losses(halves, session, range(2, 4)) == expected


def test_labels_and_lengths_that_the_model_does_not_have(halves: Halves) -> None:
    session = open_session(halves)
    before = session.adapter.values()
    for label in (-1, 3, -100, 2**40):
        batch = halves.batch()
        batch.labels[1] = label
        with pytest.raises(WireError, match="class indices below 3"):
            halves.engine.step(session, 1, 0, batch)
        with pytest.raises(WireError, match="class indices below 3"):
            halves.engine.evaluate(session, 0, batch)
    for ask in (lambda b: halves.engine.step(session, 1, 0, b), lambda b: halves.engine.evaluate(session, 0, b)):
        with pytest.raises(ModelError, match="at most 128"):
            ask(halves.batch(tokens=129))
    assert same(session.adapter.values(), before)


def test_labels_of_a_causal_lm() -> None:
    halves = Halves(family="llama", task="causal-lm")
    session = open_session(halves)
    for label in (-1, -99, -101, 128):
        batch = halves.batch()
        batch.labels[1, 2] = label
        with pytest.raises(WireError, match="token ids below 128"):
            halves.engine.step(session, 1, 0, batch)
    batch = halves.batch()
    batch.labels[:, 3:] = -100
    score = halves.engine.evaluate(session, 0, batch)
    assert score.count == 3 * 2  # the first label of three predicts nothing
    assert score.logits is None
    batch.labels[:] = -100
    before = session.adapter.values()
    with pytest.raises(WireError, match="the loss of step 1 is nan"):
        halves.engine.step(session, 1, 0, batch)
    assert same(session.adapter.values(), before)
    assert halves.engine.evaluate(session, 0, batch).count == 0
    assert math.isfinite(halves.engine.step(session, 1, 0, halves.batch()).loss)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_fingerprint": "e" * 64},
            "the base models differ: fingerprint eeeeeeeeeeee on device-1, ffffffffffff at the edge",
        ),
        ({"task": "causal-lm"}, "device-1 trains for causal-lm, this edge for classification"),
        ({"cut": 1}, "cut 1 is below 2, the lowest"),
        ({"cut": 0}, "cut 0 is not possible"),
        ({"cut": 4}, "cut 4 is not possible"),
        ({"rank": 3}, "device-1 has LoRA rank 3, above 2, that of the LoRA settings: lower the device's `rank`"),
        ({"lora": {"rank": 3}}, "LoRA settings differ between device-1 and the edge: .*3"),
        ({"lora": {"alpha": 3.0}}, "LoRA settings differ"),
        ({"lora": {"dropout": 0.5}}, "LoRA settings differ"),
        ({"lora": {"target_modules": ("query",)}}, "LoRA settings differ"),
    ],
)
def test_devices_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    halves = Halves(lowest_cut=2)
    if "lora" in changes:
        changes = {"lora": replace(halves.lora, **changes["lora"])}
    request = replace(halves.request(), **changes)
    with pytest.raises((RefusedError, ModelError), match=message):
        halves.engine.open(request, halves.initial)
    assert halves.engine.resume(request) is None


def test_a_version_that_does_not_fit_opens_nothing(halves: Halves) -> None:
    request = halves.request("device-9")
    some = dict(list(halves.initial.items())[:-1])
    with pytest.raises(SflError, match="missing"):
        halves.engine.open(request, some)
    assert halves.engine.resume(request) is None


def test_resume_knows_the_session_by_its_name(halves: Halves) -> None:
    session = open_session(halves, "device-3")
    assert halves.engine.resume(halves.request("device-3")) is session
    assert halves.engine.resume(halves.request("device-3", session="another")) is None
    newer = open_session(halves, "device-3", session="another")
    assert not halves.engine.is_open(session)
    halves.engine.close(session)  # which has lost its place
    assert halves.engine.is_open(newer)
    halves.engine.close(newer)
    assert halves.engine.resume(halves.request("device-3", session="another")) is None
