"""One edge adapter for all devices, as SplitLoRA has it: stepped in turn, taken once, moved by the first who adopts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import AdapterState, edge_half, total
from sfl.edge_server.engine import Session
from sfl.errors import AdapterError, RefusedError
from sfl.wire.split import OptimizerSpec, StepTerms, TrainingRules
from tests.edge_server.made import Halves, at_rank, eventually, served
from tests.edge_server.test_engine import same
from tests.edge_server.test_service import linked

RULES = TrainingRules(shared_edge_adapter=True)


def open_session(halves: Halves, name: str, cut: int = 2, state: AdapterState | None = None, **changes: Any) -> Session:
    changes = {"rules": RULES, **changes}
    return halves.engine.open(halves.request(name, cut, **changes), state or halves.initial)


def step(halves: Halves, session: Session, seed: int, factor: float = 1.0) -> float:
    number, version = session.last_step + 1, session.adapter.version
    return halves.engine.step(session, number, version, halves.batch(seed), StepTerms(factor)).loss


def take(halves: Halves, session: Session, submission: str = "s") -> AdapterState:
    name = f"{session.request.device}/{submission}"
    return halves.engine.take_progress(session, name, session.adapter.version)


def test_turns_of_many_are_the_steps_of_one() -> None:
    one, many = Halves(), Halves()
    alone = open_session(one, "alone", rules=TrainingRules())
    sessions = [open_session(many, f"device-{index}") for index in range(3)]
    for seed in range(9):
        assert step(many, sessions[seed % 3], seed) == step(one, alone, seed)
    for session in sessions:
        assert same(session.adapter.values(), alone.adapter.values())
    held = [tensor.data_ptr() for tensor in sessions[0].adapter.tensors()["adapter"]]
    assert held == [tensor.data_ptr() for tensor in sessions[2].adapter.tensors()["adapter"]]


@pytest.mark.parametrize("optimizer", [OptimizerSpec("adamw", 0.01, 0.1), OptimizerSpec("sgd", 0.1, 0.1)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("proximal", [0.0, 0.5])
def test_a_step_trains_the_layers_of_its_own_cut(proximal: float, optimizer: OptimizerSpec) -> None:
    halves, rules = Halves(), TrainingRules(shared_edge_adapter=True, proximal=proximal)
    low, high = (open_session(halves, f"cut-{cut}", cut, rules=rules, optimizer=optimizer) for cut in (1, 3))
    for seed in range(3):
        step(halves, low, seed)  # so that there are moments, and something to be pulled back from
    before = low.adapter.values()
    step(halves, high, 3)
    after = low.adapter.values()
    assert all(np.array_equal(before[key], after[key]) == (key.layer < 3) for key in before)
    assert {key.layer for key in high.adapter.values()} == {3, 1 << 20}
    assert same(high.adapter.values(), edge_half(after, 3))


def test_submissions_of_all_add_up_to_what_was_learnt() -> None:
    halves = Halves()
    sessions = [open_session(halves, f"device-{cut}", cut) for cut in (1, 2, 3)]
    start = sessions[0].adapter.values()
    summed = {key: np.zeros_like(value) for key, value in start.items()}
    for turn in range(9):
        session = sessions[turn % 3]
        step(halves, session, turn)
        if turn % 2:
            progress = take(halves, session, str(turn))
            assert progress.keys() == session.adapter.values().keys()
            assert same(take(halves, session, str(turn)), progress)  # asked twice, taken once
            summed |= {key: summed[key] + value for key, value in progress.items()}
    last = take(halves, sessions[0], "last")  # of the lowest cut, and so of all layers
    for key, value in sessions[0].adapter.values().items():
        np.testing.assert_allclose(start[key] + summed[key] + last[key], value, atol=1e-6)
    for session in sessions:
        assert not any(value.any() for value in take(halves, session, "once more").values())


@pytest.mark.parametrize("keep", [True, False])
def test_the_first_to_adopt_moves_it_and_the_others_find_it_there(keep: bool) -> None:
    halves = Halves()
    first, second = (open_session(halves, f"device-{cut}", cut) for cut in (2, 1))
    step(halves, first, 0)
    sent, at_first_take = take(halves, first), second.adapter.values()
    step(halves, second, 1)
    unsent = {key: value - at_first_take[key] for key, value in second.adapter.values().items()}
    assert sent.keys() < unsent.keys()
    below = second.adapter.values()
    newer = {key: value + 1 for key, value in halves.initial.items()}
    halves.engine.adopt(first, 1, newer, keep)
    moved = second.adapter.values()
    expected = edge_half(newer, 1)
    if keep:  # layer 1 was taken by nobody, as only the second device trains it
        learnt = {key: unsent[key] if key.layer >= 2 else below[key] - halves.initial[key] for key in unsent}
        expected = total(expected, learnt)
    for key, value in expected.items():
        np.testing.assert_allclose(moved[key], value, atol=1e-6)
    assert (first.adapter.version, second.adapter.version) == (1, 0)
    step(halves, second, 2)  # its own half is of version 0 still
    here = second.adapter.values()
    halves.engine.adopt(second, 1, newer, keep)
    assert same(second.adapter.values(), here)
    assert second.adapter.version == 1


def test_a_device_that_comes_with_a_newer_version_brings_it_and_drops_nothing() -> None:
    halves = Halves()
    first = open_session(halves, "first")
    step(halves, first, 0)
    learnt = {key: value - halves.initial[key] for key, value in first.adapter.values().items()}
    newer = {key: value + 1 for key, value in halves.initial.items()}
    second = open_session(halves, "second", state=newer, version=3)
    for key, value in first.adapter.values().items():
        np.testing.assert_allclose(value, newer[key] + learnt[key], atol=1e-6)
    assert (first.adapter.version, second.adapter.version) == (0, 3)
    late = open_session(halves, "late", version=1)
    assert same(late.adapter.values(), first.adapter.values())


def test_each_device_has_its_own_place_on_the_schedule() -> None:
    halves = Halves()
    fast, slow = (open_session(halves, name, optimizer=OptimizerSpec("sgd", 0.1, decay_steps=2)) for name in ("fast", "slow"))
    for seed in range(2):
        step(halves, fast, seed)
    before = fast.adapter.values()
    step(halves, fast, 2)  # its schedule has ended
    assert same(fast.adapter.values(), before)
    step(halves, slow, 3)
    assert not same(fast.adapter.values(), before)
    before = fast.adapter.values()
    step(halves, slow, 4, factor=0.5)
    half_way = fast.adapter.values()
    other = Halves()
    session = open_session(other, "alone", state=halves.initial | before, optimizer=OptimizerSpec("sgd", 0.1 * 0.5 * 0.5))
    step(other, session, 4)
    for key, value in session.adapter.values().items():
        np.testing.assert_allclose(half_way[key], value, atol=1e-7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 1}, "second cannot share the edge's adapter with first: rank 1 against 0; give all devices the same"),
        ({"optimizer": OptimizerSpec("sgd", 0.01)}, "optimizer sgd against adamw"),
        ({"optimizer": OptimizerSpec("adamw", 0.01, 0.5)}, "weight_decay 0.5 against 0.0"),
        ({"rules": dataclasses.replace(RULES, proximal=0.5)}, "rules .*proximal=0.5.* against"),
    ],
)
def test_those_who_cannot_share(changes: dict[str, Any], message: str) -> None:
    halves = Halves()
    first = open_session(halves, "first")
    step(halves, first, 0)
    state = at_rank(halves.initial, changes.get("rank", 0))
    with pytest.raises(RefusedError, match=message):
        open_session(halves, "second", state=state, **changes)
    open_session(halves, "second", optimizer=OptimizerSpec("adamw", 0.5, decay_steps=3))  # rates are each device's own
    apart = open_session(halves, "apart", rules=TrainingRules())  # and who does not share is not concerned
    assert same(apart.adapter.values(), edge_half(halves.initial, 2))


def test_it_ends_with_the_last_session_that_shares_it() -> None:
    halves = Halves()
    sessions = [open_session(halves, name) for name in ("first", "second")]
    step(halves, sessions[0], 0)
    learnt = sessions[1].adapter.values()
    halves.engine.close(sessions[0])
    sessions[0] = open_session(halves, "first")
    assert same(sessions[0].adapter.values(), learnt)
    for session in sessions:
        halves.engine.close(session)
    assert same(
        open_session(halves, "first", rank=1, state=at_rank(halves.initial, 1)).adapter.values(),
        edge_half(at_rank(halves.initial, 1), 2),
    )


def test_a_version_without_the_layers_below_the_cut_is_not_enough() -> None:
    halves = Halves()
    with pytest.raises(AdapterError, match=r"1/attention\.self\.query/A is missing"):
        open_session(halves, "first", cut=3, state=edge_half(halves.initial, 3))
    assert halves.engine.resume(halves.request("first")) is None


def test_over_grpc_the_halves_of_all_submissions_are_what_was_learnt() -> None:
    alone = Halves()
    session = open_session(alone, "alone", cut=2, rules=TrainingRules())
    with served(Halves()) as edge:
        requests = [edge.halves.request(f"device-{index}", rules=RULES) for index in range(2)]
        with linked(edge, requests[0]) as first, linked(edge, requests[1]) as second:
            for number in range(1, 4):
                for index, link in enumerate((first, second)):
                    seed = 2 * number + index
                    assert link.step(number, 0, edge.halves.batch(seed)).loss == step(alone, session, seed)
            first.submit("device-0/1", 0)
            second.submit("device-1/1", 0)
            eventually(lambda: len(edge.federation.submitted) == 2)
            newer = edge.federation.publish(1)
            for link in (first, second):
                link.adopt(1, False)
            assert edge.federation.fetches == [0, 1]
            found = edge.halves.engine.resume(requests[1])
            assert found is not None
            assert same(found.adapter.values(), edge_half(newer, 2))
            first.close()
            second.close()
    whole = [progress for _, progress in sorted(edge.federation.submitted, key=lambda each: each[0].submission)]
    learnt = {key: value - alone.initial[key] for key, value in session.adapter.values().items()}
    assert same(whole[0], learnt)
    assert not any(value.any() for value in whole[1].values())
