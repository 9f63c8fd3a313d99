"""A half's adapter kept in a file and restored: it goes on as if it had never been away."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfl.adapters.state import FROZEN_A, FROZEN_B
from sfl.errors import AdapterError
from sfl.model.local_adapter import LocalAdapter, values_in
from sfl.state_file import Tensors, read_state, write_state
from sfl.wire.split import OptimizerSpec, TrainingRules
from tests.model.test_local_adapter import CUT, injected, random_state, same, train

RULES = {
    "plain": TrainingRules(),
    "proximal": TrainingRules(proximal=0.5),
    "frozen A": TrainingRules(frozen_parts=("A",)),
    "fresh": TrainingRules(fresh_optimizer=True),
}


def through_a_file(adapter: LocalAdapter, folder: Path) -> Tensors:
    write_state(folder / "a.state", {"version": adapter.version}, adapter.state())
    return read_state(folder / "a.state")[1]


@pytest.mark.parametrize("spec", [OptimizerSpec("adamw", 0.01, 0.1), OptimizerSpec("sgd", 0.1, 0.1)], ids=["adamw", "sgd"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("frozen", [0, 3])
@pytest.mark.parametrize("steps", [0, 3])
def test_it_goes_on_where_it_was(tmp_path: Path, spec: OptimizerSpec, rules: TrainingRules, frozen: int, steps: int) -> None:
    half, slots = injected()
    original = LocalAdapter(slots, random_state(slots, 0, frozen), CUT, 3, spec, 0, rules)
    train(half, original, range(steps))
    original.take_progress()
    train(half, original, range(steps, 2 * steps))  # so that the anchor is not the version
    tensors = through_a_file(original, tmp_path)

    other_half, other_slots = injected()
    made = LocalAdapter(other_slots, values_in(tensors), CUT, 3, spec, 0, rules)
    back = LocalAdapter(slots, random_state(slots, 9, 5 - frozen), CUT, 1, spec, 0, rules)  # has gone elsewhere since
    train(half, back, range(2))
    for restored, its_half in ((made, other_half), (back, half)):
        restored.restore(tensors, 3)
        assert restored.version == 3
        assert same(restored.values(), original.values())
        train(its_half, restored, range(20, 23))
    train(half, original, range(20, 23))
    newer = random_state(slots, 4, frozen)
    for restored in (made, back):
        assert same(restored.values(), original.values())
    expected = original.take_progress()
    for restored in (made, back):
        assert same(restored.take_progress(), expected)
    for adapter, its_half in ((original, half), (made, other_half), (back, half)):
        adapter.adopt(newer, 4, keep_progress=True)
        train(its_half, adapter, range(30, 32))
    assert same(made.values(), original.values()) and same(back.values(), original.values())


def test_what_is_kept_stays_though_training_goes_on(tmp_path: Path) -> None:
    half, slots = injected()
    adapter = LocalAdapter(slots, random_state(slots), CUT, 0, OptimizerSpec("adamw", 0.01))
    train(half, adapter, range(2))
    kept = adapter.state()
    copies = {name: value.copy() for name, value in kept.items()}
    train(half, adapter, range(2, 4))
    assert all(np.array_equal(kept[name], value) for name, value in copies.items())
    adapter.restore(kept, 0)
    train(half, adapter, range(4, 6))
    assert all(np.array_equal(kept[name], value) for name, value in copies.items())  # nor does training change what it came from


def test_a_new_beginning_has_no_moments(tmp_path: Path) -> None:
    half, slots = injected()
    used = LocalAdapter(slots, random_state(slots), CUT, 0, OptimizerSpec("adamw", 0.01))
    train(half, used, range(3))
    version = random_state(slots, 1)
    used.begin(version, 2)
    fresh = LocalAdapter(slots, version, CUT, 2, OptimizerSpec("adamw", 0.01))
    assert not any(value.any() for value in used.take_progress().values())
    for adapter in (used, fresh):
        train(half, adapter, range(2))
    assert same(used.values(), fresh.values()) and used.version == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("value", "is missing from the half at cut 2"),
        ("anchor", "is missing from a state"),
        ("origin", "is missing from a state"),
        ("unknown anchor", "is unknown to a state"),
        ("unknown moment", "is unknown to a state"),
        ("shape", "has shape"),
    ],
)
def test_what_is_no_state_of_it_changes_nothing(change: str, message: str) -> None:
    half, slots = injected()
    adapter = LocalAdapter(slots, random_state(slots), CUT, 0, OptimizerSpec("adamw", 0.01), 0, RULES["proximal"])
    train(half, adapter, range(2))
    tensors, before = adapter.state(), adapter.state()
    name = next(each for each in tensors if each.startswith(f"{change.split()[-1]}/")) if change != "shape" else "value/0"
    if change.startswith("unknown"):
        tensors[name.replace("/0/", "/77/")] = tensors[name]
    elif change == "shape":
        name = next(each for each in tensors if each.startswith("value/"))
        tensors[name] = tensors[name][:1]
    else:
        del tensors[name]
    with pytest.raises(AdapterError, match=message):
        adapter.restore(tensors, 5)
    assert adapter.version == 0
    after = adapter.state()
    assert after.keys() == before.keys() and all(np.array_equal(after[key], value) for key, value in before.items())


def test_frozen_factors_are_among_the_values() -> None:
    _, slots = injected()
    adapter = LocalAdapter(slots, random_state(slots, frozen=2), CUT, 0, OptimizerSpec())
    assert {key.part for key in values_in(adapter.state())} == {"A", "B", FROZEN_A, FROZEN_B}
