"""Ranks, frozen factors, frozen parts and the proximal term: split training is still the unsplit one, by peft's own layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer

from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState, device_half, difference
from sfl.data.batches import Batch
from sfl.device.trainer import DeviceTrainer
from sfl.model.families import family_of
from sfl.model.lora import AdapterSlots
from sfl.model.tasks import make_labels
from sfl.wire.split import OptimizerSpec, SessionRequest, StepTerms, TrainingRules
from tests.device.test_trainer import DirectEdge, batch
from tests.edge_server.made import Halves, at_rank

RANK, STEPS = 4, 5
ADAMW, SGD = OptimizerSpec("adamw", 0.01), OptimizerSpec("sgd", 0.1, decay_steps=20)
BATCHES = [batch(4, seed) for seed in range(3 * STEPS)]


def with_frozen(state: AdapterState, rank: int, seed: int) -> AdapterState:
    """`state` with another B than zero, and random frozen factors beside every pair."""
    chance = np.random.default_rng(seed)

    def drawn(*shape: int) -> Any:
        return chance.normal(0, 0.05, shape).astype(np.float32)

    result = {key: value + drawn(*value.shape) if key.part == "B" else value for key, value in state.items()}
    for key, value in state.items():
        if rank and key.part == "A":
            result[key._replace(part=FROZEN_A)] = drawn(rank, value.shape[1])
        if rank and key.part == "B":
            result[key._replace(part=FROZEN_B)] = drawn(len(value), rank)
    return result


class Split:
    """A device and its edge, called directly."""

    def __init__(self, halves: Halves, request: SessionRequest, state: AdapterState) -> None:
        self._engine, self._state = halves.engine, state
        self.session = halves.engine.open(request, state)
        half, self.adapter = halves.device_of(request, state)
        self._link = DirectEdge(halves.engine, self.session)
        self._trainer = DeviceTrainer(half, self.adapter, self._link, halves.task)

    def train(self, batches: list[Batch], factor: float = 1.0, offsets: tuple[float, ...] = ()) -> list[float]:
        done, terms = self.session.last_step, StepTerms(factor, offsets)
        return [self._trainer.step(number, each, terms).loss for number, each in enumerate(batches, start=done + 1)]

    def adopt(self, state: AdapterState, version: int, keep: bool) -> None:
        self._engine.adopt(self.session, version, state, keep)
        self.adapter.adopt(device_half(state, self.session.request.cut), version, keep)

    def values(self) -> AdapterState:
        return self.adapter.values() | self.session.adapter.values()

    def progress(self) -> AdapterState:
        edge = self._engine.take_progress(self.session, "s/1", self.session.adapter.version)
        return self.adapter.take_progress() | edge


class Unsplit:
    """peft's layers in the uncut model: one adapter that is trained and, for frozen factors, a second one."""

    def __init__(self, halves: Halves, state: AdapterState, optimizer: OptimizerSpec, rules: TrainingRules) -> None:
        self.model, self._optimizer, self._rules, self._task = halves.model(), optimizer, rules, halves.task
        self.model.config.use_cache = False
        self.model.requires_grad_(False)
        family = family_of(self.model.config)
        ranks = {name: value.shape[0] for (_, _, name), value in state.items() if name in ("A", FROZEN_A)}
        scale = halves.lora.alpha / halves.lora.rank
        for name, part in (("default", "A"), ("frozen", FROZEN_A)):
            if part in ranks:
                config = LoraConfig(
                    r=ranks[part],
                    lora_alpha=int(scale * ranks[part]),
                    target_modules=list(halves.lora.target_modules),
                    fan_in_fan_out=halves.family == "gpt2",
                )
                inject_adapter_in_model(config, self.model, name)
        tensors: dict[AdapterKey, torch.nn.Parameter] = {}
        self.layers: dict[AdapterKey, LoraLayer] = {}  # by the key of A
        for index, block in enumerate(self.model.get_submodule(family.blocks)):
            for name, layer in block.named_modules():
                if isinstance(layer, LoraLayer):
                    layer.set_adapter(["default", "frozen"])
                    self.layers[AdapterKey(index, name, "A")] = layer
                    for part, a, adapter in (("A", "B", "default"), (FROZEN_A, FROZEN_B, "frozen")):
                        if part in ranks:
                            tensors[AdapterKey(index, name, part)] = layer.lora_A[adapter].weight
                            tensors[AdapterKey(index, name, a)] = layer.lora_B[adapter].weight
        for root in family.head:
            for name, module in self.model.get_submodule(root).named_modules(prefix=root):
                for part, parameter in module.named_parameters(recurse=False):
                    tensors[AdapterKey(HEAD, name, part)] = parameter
        assert tensors.keys() == state.keys()
        with torch.no_grad():
            for key, tensor in tensors.items():
                fixed = key.part in (FROZEN_A, FROZEN_B, *rules.frozen_parts)
                tensor.requires_grad_(not fixed).copy_(torch.from_numpy(state[key]))
        self.tensors = tensors
        self.trained = {key: tensor for key, tensor in tensors.items() if tensor.requires_grad}
        self._origin = {key: tensor.detach().clone() for key, tensor in self.trained.items()}
        make = torch.optim.SGD if optimizer.name == "sgd" else torch.optim.AdamW
        self._stepper = make(self.trained.values(), lr=optimizer.learning_rate, weight_decay=0.0)

    def train(self, batches: list[Batch], factor: float = 1.0, done: int = 0) -> list[float]:
        losses, schedule = [], self._optimizer
        for number, each in enumerate(batches, start=done):
            falling = 1 - number / schedule.decay_steps if schedule.decay_steps else 1.0
            self._stepper.param_groups[0]["lr"] = schedule.learning_rate * falling * factor
            ids, mask = torch.from_numpy(each.input_ids), torch.from_numpy(each.attention_mask)
            assert each.labels is not None
            labels = make_labels(self._task, ids, mask, torch.from_numpy(each.labels))
            loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            losses.append(loss.item())
            if self._rules.proximal:
                away = sum((tensor - self._origin[key]).square().sum() for key, tensor in self.trained.items())
                loss = loss + self._rules.proximal / 2 * away
            loss.backward()
            self._stepper.step()
            self._stepper.zero_grad()
        return losses

    def values(self) -> AdapterState:
        return AdapterSlots.read(self.tensors)


def pair(family: str, cut: int, rank: int, frozen: int, rules: TrainingRules, optimizer: OptimizerSpec) -> tuple[Split, Unsplit]:
    halves = Halves(family=family, rank=RANK)
    state = at_rank(with_frozen(halves.initial, frozen, seed=1), rank)
    request = halves.request(cut=cut, rank=rank, rules=rules, optimizer=optimizer)
    return Split(halves, request, state), Unsplit(halves, state, optimizer, rules)


CASES: dict[str, dict[str, Any]] = {
    "as ever": {},
    "a smaller rank": {"rank": 1},
    "frozen factors": {"frozen": 6},
    "frozen factors beside a smaller rank": {"frozen": 3, "rank": 2},
    "FFA": {"rules": TrainingRules(frozen_parts=("A",))},
    "FFA with all of it": {"rules": TrainingRules(frozen_parts=("A",)), "frozen": 5, "rank": 2},
}


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize(("family", "cut"), [("bert", 1), ("llama", 3), ("gpt2", 2)])
@pytest.mark.parametrize("case", CASES)
def test_split_is_unsplit_to_the_bit(case: str, family: str, cut: int, optimizer: OptimizerSpec) -> None:
    settings = {"rank": 0, "frozen": 0, "rules": TrainingRules(), **CASES[case]}
    split, unsplit = pair(family, cut, optimizer=optimizer, **settings)
    start = split.values()
    assert split.train(BATCHES[:STEPS]) == unsplit.train(BATCHES[:STEPS])
    found, expected = split.values(), unsplit.values()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.array_equal(found[key], value), f"{key} differs"
        assert np.array_equal(value, start[key]) == (key not in unsplit.trained), f"{key} was trained, or was not"
    progress = split.progress()
    assert progress.keys() == unsplit.trained.keys()
    trained = {key: start[key] for key in progress}
    expected_progress = difference({key: expected[key] for key in progress}, trained)
    assert all(np.array_equal(progress[key], value) for key, value in expected_progress.items())


@pytest.mark.parametrize("optimizer", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("frozen_parts", [(), ("A",)])
def test_the_proximal_term_is_that_of_the_loss(frozen_parts: tuple[str, ...], optimizer: OptimizerSpec) -> None:
    rules = TrainingRules(proximal=0.5, frozen_parts=frozen_parts)
    split, unsplit = pair("bert", 2, 2, 3, rules, optimizer)
    np.testing.assert_allclose(split.train(BATCHES[:STEPS]), unsplit.train(BATCHES[:STEPS]), rtol=1e-6)
    for key, value in unsplit.values().items():
        np.testing.assert_allclose(split.values()[key], value, rtol=1e-4, atol=1e-6, err_msg=str(key))
    free, _ = pair("bert", 2, 2, 3, replace(rules, proximal=0.0), optimizer)
    free.train(BATCHES[:STEPS])
    went, was_free = (sum(float((value**2).sum()) for value in each.progress().values()) for each in (split, free))
    assert went < 0.99 * was_free


def test_a_factor_on_the_rate_reaches_both_halves_and_one_step_alone() -> None:
    split, unsplit = pair("llama", 2, 0, 0, TrainingRules(), SGD)
    again, _ = pair("llama", 2, 0, 0, TrainingRules(), SGD)
    assert split.train(BATCHES[:STEPS], 0.25) == unsplit.train(BATCHES[:STEPS], 0.25)
    assert all(np.array_equal(split.values()[key], value) for key, value in unsplit.values().items())
    again.train(BATCHES[:STEPS], 1.0)
    assert any(not np.array_equal(split.values()[key], value) for key, value in again.values().items())


def test_offsets_of_the_logits_are_as_good_as_biases_of_the_head() -> None:
    """A head whose bias is greater by the offsets learns the same, and every gradient is the same."""
    halves, offsets = Halves(family="bert", rank=RANK), (1.5, -3.0, 0.25)
    bias = next(key for key in halves.initial if key.layer == HEAD and key.part == "bias" and len(halves.initial[key]) == 3)
    raised = halves.initial | {bias: halves.initial[bias] + np.float32(offsets)}
    request = halves.request(cut=2, optimizer=SGD)
    split, other = Split(halves, request, halves.initial), Split(Halves(family="bert", rank=RANK), request, raised)
    np.testing.assert_allclose(split.train(BATCHES[:STEPS], offsets=offsets), other.train(BATCHES[:STEPS]), rtol=1e-6)
    found, expected = split.progress(), other.progress()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-6, err_msg=str(key))


def test_frozen_factors_that_come_change_and_go_are_as_good_as_weights_of_the_base() -> None:
    halves = Halves(family="bert", rank=RANK)
    versions = [with_frozen(halves.initial, rank, seed) for seed, rank in enumerate((0, 3, 7, 0))]
    split = Split(halves, halves.request(cut=2, optimizer=SGD), versions[0])
    plain = Unsplit(halves, versions[0], SGD, TrainingRules())
    scale = halves.lora.alpha / halves.lora.rank
    folded: dict[AdapterKey, Any] = {}
    for version, state in enumerate(versions):
        if version:
            split.adopt(state, version, keep=False)
        with torch.no_grad():
            for key, layer in plain.layers.items():
                a, b = (state.get(key._replace(part=part)) for part in (FROZEN_A, FROZEN_B))
                product = torch.zeros(()) if a is None or b is None else scale * torch.from_numpy(b.astype("f8") @ a.astype("f8"))
                layer.get_base_layer().weight.add_((product - folded.get(key, 0)).float())
                folded[key] = product
            for key, tensor in plain.tensors.items():
                tensor.copy_(torch.from_numpy(state[key]))
        done = 3 * version
        here = BATCHES[done : done + 3]
        np.testing.assert_allclose(split.train(here), plain.train(here, done=done), rtol=1e-5)
        values = split.values()
        assert values.keys() == state.keys()
        for key, value in plain.values().items():
            np.testing.assert_allclose(values[key], value, rtol=1e-4, atol=1e-6, err_msg=f"{key} of version {version}")


def test_an_edge_serves_any_mix_of_ranks_rules_and_frozen_factors_as_if_each_were_alone() -> None:
    halves = Halves(rank=RANK)
    cases = [
        ("a", 1, 1, 0, TrainingRules()),
        ("b", 2, 0, 5, TrainingRules()),
        ("c", 3, 3, 0, TrainingRules(proximal=0.1)),
        ("d", 2, 2, 2, TrainingRules(frozen_parts=("A",))),
    ]

    def begin(on: Halves, name: str, cut: int, rank: int, frozen: int, rules: TrainingRules) -> Split:
        state = at_rank(with_frozen(on.initial, frozen, seed=cut), rank)
        return Split(on, on.request(name, cut=cut, rank=rank, rules=rules), state)

    together = [begin(halves, *case) for case in cases]
    found: list[list[float]] = [[] for _ in cases]
    for each in BATCHES[:3]:
        for losses, split in zip(found, together):
            losses += split.train([each])
    for case, losses, split in zip(cases, found, together):
        alone = begin(Halves(rank=RANK), *case)
        assert alone.train(BATCHES[:3]) == losses
        assert all(np.array_equal(split.values()[key], value) for key, value in alone.values().items())
