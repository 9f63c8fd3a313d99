"""A half's adapter by itself: its schedule, its pull to the version, its moments and its progress."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, SequentialLR

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import FROZEN_A, FROZEN_B, AdapterKey, AdapterState, total
from sfl.errors import AdapterError
from sfl.model.cut import DeviceHalf
from sfl.model.halves import load_device_half
from sfl.model.local_adapter import LocalAdapter
from sfl.model.lora import AdapterSlots, inject_lora, resolve_targets
from sfl.model.recompute import forward_in_micro_batches, recompute_blocks
from sfl.wire.split import OptimizerSpec, TrainingRules
from tests.tiny import save_tiny_model, tiny_batch, tiny_config, tiny_model

CUT, RANK = 2, 4
SPEC = OptimizerSpec("adamw", 0.01)


def injected(family: str = "bert", half: DeviceHalf | None = None) -> tuple[DeviceHalf, AdapterSlots]:
    config = tiny_config(family)
    half = half or DeviceHalf(tiny_model(config), CUT)
    return half, inject_lora(half, resolve_targets(config, LoraSpec(RANK, 2.0 * RANK, 0.0, ())))


def random_state(slots: AdapterSlots, seed: int = 0, frozen: int = 0) -> AdapterState:
    chance = np.random.default_rng(seed)
    state: AdapterState = {}
    for key in sorted(slots.keys(CUT)):
        shape = tuple(slots.slots[key][0].get_parameter("weight").shape)
        state[key] = chance.normal(0, 0.1, shape).astype(np.float32)
        if frozen:
            other = (frozen, shape[1]) if key.part == "A" else (shape[0], frozen)
            part = FROZEN_A if key.part == "A" else FROZEN_B
            state[key._replace(part=part)] = chance.normal(0, 0.1, other).astype(np.float32)
    return state


def train(half: DeviceHalf, adapter: LocalAdapter, seeds: range) -> None:
    for seed in seeds:
        adapter.mount()
        half(*tiny_batch(half.config, seed=seed)).square().mean().backward()
        adapter.step(adapter.optimizer.rate(seed + 1))


def same(left: AdapterState, right: AdapterState) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("decay_steps", [0, 7])
@pytest.mark.parametrize("warmup_steps", [0, 3])
def test_the_rate_is_that_of_torchs_own_schedules(decay_steps: int, warmup_steps: int) -> None:
    spec = OptimizerSpec("sgd", 0.3, 0.0, decay_steps, warmup_steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    rising = LinearLR(optimizer, 1 / (warmup_steps + 1), total_iters=warmup_steps)
    left = decay_steps - warmup_steps
    falling = LambdaLR(optimizer, lambda done: max(0.0, 1 - done / left) if decay_steps else 1.0)
    schedule = SequentialLR(optimizer, [rising, falling], [warmup_steps]) if warmup_steps else falling
    for step in range(1, 10):
        assert spec.rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        schedule.step()


def test_the_pull_is_to_the_version_also_where_progress_is_kept() -> None:
    half, slots = injected()
    first, second = random_state(slots, 0), random_state(slots, 1)
    adapter = LocalAdapter(slots, first, CUT, 0, OptimizerSpec("sgd", 1.0), rules=TrainingRules(proximal=0.25))
    train(half, adapter, range(3))
    adapter.adopt(second, 1, keep_progress=True)
    start = adapter.values()
    assert not same(start, second)
    for origin in (second, second):  # twice, as the anchor moves and the origin does not
        adapter.take_progress()
        before = adapter.values()
        adapter.mount()
        (0.0 * half(*tiny_batch(half.config)).sum()).backward()  # all gradients are there and 0
        assert all(norm == 0 for norm in adapter.layer_norms().values())
        adapter.step(1.0)
        for key, value in adapter.values().items():
            np.testing.assert_allclose(value, before[key] - 0.25 * (before[key] - origin[key]), rtol=1e-5, atol=1e-7)


def test_a_tensor_that_no_step_reaches_is_not_pulled() -> None:
    half, slots = injected()
    adapter = LocalAdapter(slots, random_state(slots), CUT, 0, SPEC, rules=TrainingRules(proximal=1.0))
    train(half, adapter, range(2))
    before = adapter.values()
    adapter.mount()
    adapter.step(0.1)
    assert same(adapter.values(), before)


@pytest.mark.parametrize("fresh", [True, False])
def test_fresh_moments_are_those_of_a_new_adapter(fresh: bool) -> None:
    half, slots = injected()
    versions = [random_state(slots, seed) for seed in range(2)]
    adapter = LocalAdapter(slots, versions[0], CUT, 0, SPEC, rules=TrainingRules(fresh_optimizer=fresh))
    train(half, adapter, range(3))
    adapter.adopt(versions[1], 1, keep_progress=False)
    train(half, adapter, range(3, 5))
    new = LocalAdapter(slots, versions[1], CUT, 1, SPEC)
    train(half, new, range(3, 5))
    assert same(adapter.values(), new.values()) == fresh


def test_progress_from_a_layer_on_moves_the_anchor_there_alone() -> None:
    half, slots = injected()
    start = random_state(slots)
    adapter = LocalAdapter(slots, start, CUT, 0, SPEC)
    train(half, adapter, range(2))
    upper = adapter.take_progress(first_layer=1)
    assert {key.layer for key in upper} == {1}
    train(half, adapter, range(2, 4))
    rest = adapter.take_progress()
    assert rest.keys() == start.keys()
    for key, value in adapter.values().items():
        np.testing.assert_allclose(start[key] + upper.get(key, 0) + rest[key], value, atol=1e-6)
    assert not any(value.any() for value in adapter.take_progress().values())


def test_frozen_parts_have_no_gradient_moments_or_progress_and_are_taken_from_the_version() -> None:
    half, slots = injected()
    versions = [random_state(slots, seed) for seed in range(2)]
    adapter = LocalAdapter(slots, versions[0], CUT, 0, SPEC, rules=TrainingRules(frozen_parts=("A",)))
    train(half, adapter, range(3))
    held = adapter.tensors()
    trained = sum(key.part == "B" for key in versions[0])
    assert len(held["optimiser"]) == 3 * trained  # two moments and a count each
    adapter.mount()
    half(*tiny_batch(half.config)).square().mean().backward()
    assert {key.part for key, (module, name) in slots.slots.items() if module.get_parameter(name).grad is not None} == {"B"}
    progress = adapter.take_progress()
    assert {key.part for key in progress} == {"B"}
    train(half, adapter, range(3, 4))
    unsent = {key: value - versions[0][key] - progress[key] for key, value in adapter.values().items() if key.part == "B"}
    adapter.adopt(versions[1], 1, keep_progress=True)
    for key, value in adapter.values().items():
        np.testing.assert_allclose(value, versions[1][key] + unsent.get(key, 0), atol=1e-6)


def test_frozen_factors_are_the_very_arrays_of_the_version_and_cost_nothing_when_gone() -> None:
    half, slots = injected()
    state = random_state(slots, frozen=5)
    adapter = LocalAdapter(slots, state, CUT, 0, SPEC)
    train(half, adapter, range(2))
    frozen = {key: value for key, value in state.items() if key.part in (FROZEN_A, FROZEN_B)}
    shared = [tensor.data_ptr() for tensor in adapter.tensors()["adapter"]]
    assert all(value.ctypes.data in shared for value in frozen.values())
    assert {key.part for key in adapter.take_progress()} == {"A", "B"}
    values = adapter.values()
    assert all(np.array_equal(values[key], value) for key, value in frozen.items())
    inside = len(list(half.modules()))
    plain = LocalAdapter(slots, random_state(slots), CUT, 0, SPEC)
    plain.mount()
    assert inside - len(list(half.modules())) == len(frozen)
    assert not any(isinstance(key, str) and "frozen" in key for key, _ in half.named_parameters())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_frozen_factors_are_a_product_beside_the_base(family: str) -> None:
    half, slots = injected(family)
    seen: list[Any] = []
    layer = next(module for module in half.modules() if hasattr(module, "lora_A"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    state = random_state(slots, frozen=3)
    adapter = LocalAdapter(slots, state, CUT, 0, SPEC)
    adapter.mount()
    half(*tiny_batch(half.config))
    x, y = seen[0]
    place = next(key for key in sorted(state) if key.layer == 0)
    a, b, frozen_a, frozen_b = (torch.from_numpy(state[place._replace(part=part)]) for part in ("A", "B", FROZEN_A, FROZEN_B))
    expected = layer.get_base_layer()(x) + 2.0 * (x @ (b @ a + frozen_b @ frozen_a).T)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("way", ["checkpointing", "micro-batches", "bf16", "int8"])
def test_frozen_factors_with_what_saves_memory(way: str, tmp_path: Any) -> None:
    path = save_tiny_model(tmp_path, "opt")
    plain, slots = injected("opt", load_device_half(path, CUT))
    half = load_device_half(path, CUT, way if way in ("bf16", "int8") else "fp32", "fp32" if way == "int8" else None)  # type: ignore[arg-type]
    half, others = injected("opt", half)
    if way == "checkpointing":
        recompute_blocks(half)
    state = random_state(slots, frozen=3)
    expected, found = (LocalAdapter(each, state, CUT, 0, OptimizerSpec("sgd", 0.1)) for each in (slots, others))
    train(plain, expected, range(2))
    for seed in range(2):
        found.mount()
        ids, mask = tiny_batch(half.config, seed=seed)
        hidden = forward_in_micro_batches(half, ids, mask, 2) if way == "micro-batches" else half(ids, mask)
        assert hidden.dtype == (torch.bfloat16 if way == "bf16" else torch.float32)
        hidden.float().square().mean().backward()
        found.step(0.1)
    left, right = found.take_progress(), expected.take_progress()
    away = sum(float(((left[key] - right[key]) ** 2).sum()) for key in right) ** 0.5
    length = sum(float((value**2).sum()) for value in right.values()) ** 0.5
    assert away < (0.05 if way in ("bf16", "int8") else 1e-5) * length


def bad(state: AdapterState, change: str) -> AdapterState:
    a, b = (next(key for key in sorted(state) if key.part == part) for part in (FROZEN_A, FROZEN_B))
    state = dict(state)
    if change == "alone":
        del state[b]
    elif change == "elsewhere":
        state[AdapterKey(0, "nowhere", FROZEN_A)], state[AdapterKey(0, "nowhere", FROZEN_B)] = state[a], state[b]
    elif change == "uneven":
        state[a] = state[a][:2]
    elif change == "narrow":
        state[a] = state[a][:, :3]
    elif change == "flat":
        state[a] = np.zeros((), dtype=np.float32)
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("alone", r"adapter tensor 0/attention.self.query/frozen_B is missing"),
        ("elsewhere", r"adapter tensor 0/nowhere/frozen_A has no trained factor beside it in this half"),
        ("uneven", r"frozen factors of 0/attention.self.query have the shapes \(2, 32\) and \(32, 5\), expected \(F, 32\)"),
        ("narrow", r"shapes \(5, 3\) and \(32, 5\), expected \(F, 32\) and \(32, F\)"),
        ("flat", r"have the shapes \(\)"),
    ],
)
def test_frozen_factors_that_do_not_fit_change_nothing(change: str, message: str) -> None:
    half, slots = injected()
    state = random_state(slots, frozen=5)
    with pytest.raises(AdapterError, match=message):
        LocalAdapter(slots, bad(state, change), CUT, 0, SPEC)
    adapter = LocalAdapter(slots, state, CUT, 0, SPEC)
    train(half, adapter, range(1))
    before = adapter.values()
    with pytest.raises(AdapterError, match=message):
        adapter.adopt(bad(random_state(slots, 1, frozen=5), change), 1, False)
    assert same(adapter.values(), before)
    assert adapter.version == 0


def test_frozen_factors_of_rank_0_are_none() -> None:
    _, slots = injected()
    state = random_state(slots)
    empty = {key._replace(part=FROZEN_A): value[:0] for key, value in state.items() if key.part == "A"}
    empty |= {key._replace(part=FROZEN_B): value[:, :0] for key, value in state.items() if key.part == "B"}
    adapter = LocalAdapter(slots, state | empty, CUT, 0, SPEC)
    adapter.mount()
    assert same(adapter.values(), state)


@pytest.mark.parametrize("keep", [True, False])
def test_a_rank_is_kept_and_asked_for(keep: bool) -> None:
    half, slots = injected()
    whole = random_state(slots)
    small = {key: value[:2] if key.part == "A" else value[:, :2] for key, value in whole.items()}
    with pytest.raises(AdapterError, match=r"has shape \(4, 32\), expected \(2, 32\): is the LoRA rank the same"):
        LocalAdapter(slots, whole, CUT, 0, SPEC, rank=2)
    with pytest.raises(AdapterError, match=r"has shape \(2, 32\), expected \(4, 32\)"):
        LocalAdapter(slots, small, CUT, 0, SPEC)
    adapter = LocalAdapter(slots, small, CUT, 0, SPEC, rank=2)
    train(half, adapter, range(2))
    unsent = {key: value - small[key] for key, value in adapter.values().items()}
    with pytest.raises(AdapterError, match=r"expected \(2, 32\)"):
        adapter.adopt(whole, 1, keep)
    adapter.adopt(small, 1, keep)
    assert same(adapter.values(), total(small, unsent) if keep else small)
