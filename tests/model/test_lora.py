"""Split LoRA training is the unsplit one: the same losses and the same adapters, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import HEAD, AdapterKey, AdapterState, device_half, edge_half
from sfl.errors import AdapterError, ModelError
from sfl.model.cut import DeviceHalf, EdgeHalf
from sfl.model.families import family_of
from sfl.model.lora import AdapterSlots, head_state, initial_adapter, inject_lora, resolve_targets
from sfl.model.tasks import make_labels
from tests.tiny import CLASSIFIERS_ONLY, FAMILIES, tiny_batch, tiny_config, tiny_model

Parameters = dict[AdapterKey, nn.Parameter]
MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
STEPS = 5


def sgd(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_batches(config: PretrainedConfig, task: str, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    batches = []
    for step in range(STEPS):
        ids, mask = tiny_batch(config, seed=100 * seed + step)
        batches.append((ids, mask, make_labels(task, ids, mask, ids[:, 0] % 3)))
    return batches


def starting_adapter(model: PreTrainedModel, task: str, lora: LoraSpec, seed: int = 0) -> AdapterState:
    state = initial_adapter(model.config, task, lora, head_state(EdgeHalf(copy.deepcopy(model), 1)), seed)  # type: ignore[arg-type]
    generator = np.random.default_rng(seed)
    return {  # B other than zero, so that A has a gradient from the first step
        key: value if key.part != "B" else generator.normal(0, 0.02, value.shape).astype(np.float32)
        for key, value in state.items()
    }


class Session:
    """One device with its cut, its two halves of an adapter and their optimisers."""

    def __init__(
        self,
        model: PreTrainedModel,
        cut: int,
        lora: LoraSpec,
        edge: EdgeHalf,
        slots: AdapterSlots,
        state: AdapterState,
        make: MakeOptimizer,
    ) -> None:
        self.cut, self.edge, self.edge_slots = cut, edge, slots
        self.device = DeviceHalf(copy.deepcopy(model), cut).train()
        self.device_slots = inject_lora(self.device, lora)
        self.low = self.device_slots.parameters_for(device_half(state, cut), cut)
        self.high = slots.parameters_for(edge_half(state, cut), cut)
        self.device_slots.mount(self.low)
        self.optimizers = [make(self.low.values()), make(self.high.values())]
        self.losses: list[float] = []

    def step(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> None:
        sent = self.device(ids, mask)
        received = sent.detach().clone().requires_grad_(True)
        self.edge_slots.mount(self.high)
        loss = self.edge(received, mask, labels, self.cut).loss
        assert loss is not None
        loss.backward()
        assert received.grad is not None
        sent.backward(received.grad.clone())
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())

    def adapter(self) -> AdapterState:
        return AdapterSlots.read(self.low) | AdapterSlots.read(self.high)


def reference(
    model: PreTrainedModel,
    task: str,
    lora: LoraSpec,
    state: AdapterState,
    make: MakeOptimizer,
    batches: list[tuple[torch.Tensor, ...]],
) -> tuple[list[float], AdapterState]:
    """The same training by peft on the uncut model."""
    family = family_of(model.config)
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS if task == "classification" else TaskType.CAUSAL_LM,
        r=lora.rank,
        fan_in_fan_out=family.model_type == "gpt2",
        lora_alpha=int(lora.alpha),
        target_modules=list(lora.target_modules),
        modules_to_save=list(family.head) if task == "classification" else None,
    )
    peft_model = get_peft_model(copy.deepcopy(model), config).train()
    peft_model.config.use_cache = False
    parameters: Parameters = {}
    for name, parameter in peft_model.named_parameters():
        if not parameter.requires_grad:
            continue
        path = name.removeprefix("base_model.model.")
        if path.startswith(f"{family.blocks}."):
            index, _, rest = path.removeprefix(f"{family.blocks}.").partition(".")
            module, _, part = rest.removesuffix(".default.weight").rpartition(".lora_")
            parameters[AdapterKey(int(index), module, part)] = parameter
        else:
            module, _, part = path.replace(".modules_to_save.default", "").rpartition(".")
            parameters[AdapterKey(HEAD, module, part)] = parameter
    assert parameters.keys() == state.keys()
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(state[key]))
    optimizer = make(parameters.values())
    losses = []
    for ids, mask, labels in batches:
        loss = peft_model(input_ids=ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, AdapterSlots.read(parameters)


def require_equal(left: AdapterState, right: AdapterState) -> None:
    assert left.keys() == right.keys()
    for key in left:
        assert np.array_equal(left[key], right[key]), str(key)


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize(
    ("family", "task"),
    [(family, "classification") for family in FAMILIES]
    + [(family, "causal-lm") for family in FAMILIES if family not in CLASSIFIERS_ONLY],
)
def test_split_training_is_bit_equal_to_peft_on_the_uncut_model(family: str, task: str, make: MakeOptimizer) -> None:
    model = tiny_model(tiny_config(family), task)
    lora = resolve_targets(model.config, LoraSpec(rank=4, alpha=8))
    state = starting_adapter(model, task, lora)
    batches = make_batches(model.config, task)
    losses, trained = reference(model, task, lora, state, make, batches)
    edge = EdgeHalf(copy.deepcopy(model), 1).train()
    slots = inject_lora(edge, lora)
    for cut in (1, 2, 3):
        session = Session(model, cut, lora, edge, slots, state, make)
        for batch in batches:
            session.step(*batch)
        assert session.losses == losses, f"cut {cut}"
        require_equal(session.adapter(), trained)
    assert all(not np.array_equal(trained[key], state[key]) for key in state)


def test_sessions_with_other_cuts_on_one_edge_do_not_touch_each_other() -> None:
    model = tiny_model(tiny_config("llama"))
    lora = resolve_targets(model.config, LoraSpec(rank=4))
    state = starting_adapter(model, "classification", lora)
    edge = EdgeHalf(copy.deepcopy(model), 1).train()
    slots = inject_lora(edge, lora)
    batches = {cut: make_batches(model.config, "classification", seed=cut) for cut in (1, 3)}
    alone, together = ({cut: Session(model, cut, lora, edge, slots, state, adamw) for cut in (1, 3)} for _ in range(2))
    for cut, session in alone.items():
        for batch in batches[cut]:
            session.step(*batch)
    for step in range(STEPS):
        for cut, session in together.items():
            session.step(*batches[cut][step])
    for cut in (1, 3):
        assert together[cut].losses == alone[cut].losses
        require_equal(together[cut].adapter(), alone[cut].adapter())


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "llama"])
def test_bf16_base_trains_lora_and_head_in_fp32(family: str) -> None:
    model = tiny_model(tiny_config(family)).to(torch.bfloat16)
    lora = resolve_targets(model.config, LoraSpec(rank=4))
    state = starting_adapter(model, "classification", lora)
    edge = EdgeHalf(copy.deepcopy(model), 2).train()
    session = Session(model, 2, lora, edge, inject_lora(edge, lora), state, adamw)
    ids, mask, labels = make_batches(model.config, "classification")[0]
    assert session.device(ids, mask).dtype == torch.bfloat16
    for _ in range(8):
        session.step(ids, mask, labels)
    assert session.losses[-1] < session.losses[0]
    for parameter in [*session.low.values(), *session.high.values()]:
        assert parameter.dtype == torch.float32
    frozen = [p for half in (edge, session.device) for p in half.parameters() if not p.requires_grad]
    assert frozen and all(parameter.dtype == torch.bfloat16 and parameter.grad is None for parameter in frozen)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_lora_and_head_are_trained_and_both_halves_hold_the_whole_adapter(family: str) -> None:
    model = tiny_model(tiny_config(family))
    lora = resolve_targets(model.config, LoraSpec(rank=4))
    state = initial_adapter(model.config, "classification", lora, head_state(EdgeHalf(copy.deepcopy(model), 1)), seed=0)
    device, edge = DeviceHalf(copy.deepcopy(model), 2), EdgeHalf(copy.deepcopy(model), 1)
    low, high = inject_lora(device, lora), inject_lora(edge, lora)
    assert low.keys(2) | high.keys(2) == state.keys() and not low.keys(2) & high.keys(2)
    low.parameters_for(device_half(state, 2), 2)  # shapes fit, or this raises
    high.parameters_for(edge_half(state, 2), 2)
    for half, slots in ((device, low), (edge, high)):
        assert sum(p.requires_grad for p in half.parameters()) == len(slots.slots)
    assert {key.module.partition(".")[0] for key in state if key.layer == HEAD} == set(family_of(model.config).head)
    fresh = copy.deepcopy(model)
    fresh.config.use_cache = False
    ids, mask = tiny_batch(model.config)
    high.mount(high.parameters_for(edge_half(state, 2), 2))  # B is zero: the model is still its base
    low.mount(low.parameters_for(device_half(state, 2), 2))
    assert torch.equal(edge(device(ids, mask), mask, None, 2).logits, fresh(input_ids=ids, attention_mask=mask).logits)


def test_initial_adapter_depends_on_seed_and_name_only() -> None:
    model = tiny_model(tiny_config("opt"), "causal-lm")
    lora = resolve_targets(model.config, LoraSpec(rank=4))
    before = torch.random.get_rng_state()
    first, again = (initial_adapter(model.config, "causal-lm", lora, {}, seed=7) for _ in range(2))
    inject_lora(EdgeHalf(model, 1), lora)
    assert torch.equal(torch.random.get_rng_state(), before)
    require_equal(first, again)
    other = initial_adapter(model.config, "causal-lm", lora, {}, seed=8)
    deeper = initial_adapter(tiny_config("opt", layers=6), "causal-lm", lora, {}, seed=7)
    seen = set()
    for key, value in first.items():
        assert np.array_equal(deeper[key], value)
        if key.part == "A":
            assert value.shape == (4, 32) and not np.array_equal(other[key], value)
            assert 0.9 / np.sqrt(32) < np.abs(value).max() <= 1 / np.sqrt(32)
            seen.add(value.tobytes())
        else:
            assert value.shape == (32, 4) and not value.any()
    assert len(seen) == 8


def test_adapter_that_does_not_fit() -> None:
    model = tiny_model(tiny_config("bert"))
    lora = resolve_targets(model.config, LoraSpec(rank=4))
    state = starting_adapter(model, "classification", lora)
    device, edge = DeviceHalf(copy.deepcopy(model), 2), EdgeHalf(model, 2)
    low, high = inject_lora(device, lora), inject_lora(edge, lora)
    with pytest.raises(AdapterError, match=r"2/attention.self.query/A is unknown to the half at cut 2"):
        low.parameters_for(state, 2)
    with pytest.raises(AdapterError, match=r"head/classifier/bias is missing from"):
        high.parameters_for({k: v for k, v in edge_half(state, 2).items() if k.part != "bias"}, 2)
    with pytest.raises(AdapterError, match=r"shape \(4, 31\), expected \(4, 32\)"):
        low.parameters_for({k: v[:, :31] if k.part == "A" else v for k, v in device_half(state, 2).items()}, 2)
    with pytest.raises(ModelError, match="cut at 2, not at 1"):
        low.parameters_for(device_half(state, 1), 1)
    with pytest.raises(ModelError, match="cut from 2, not at 1"):
        high.parameters_for(edge_half(state, 1), 1)
    with pytest.raises(AdapterError, match="starts with a task head"):
        initial_adapter(model.config, "classification", lora, {}, 0)


def test_targets() -> None:
    bert, opt = tiny_config("bert"), tiny_config("opt")
    assert resolve_targets(bert, LoraSpec()).target_modules == ("query", "value")
    assert resolve_targets(tiny_config("phi3"), LoraSpec()).target_modules == ("qkv_proj",)
    assert resolve_targets(bert, LoraSpec(target_modules=("attention.output.dense",))).target_modules == (
        "attention.output.dense",
    )
    turned = LoraSpec(target_modules=("value", "query", "value"))
    assert resolve_targets(bert, turned).target_modules == ("query", "value")
    every = resolve_targets(opt, LoraSpec(target_modules=("all-linear",))).target_modules
    assert {"self_attn.q_proj", "fc1", "fc2"} <= set(every) and len(every) == 6
    with pytest.raises(ModelError, match=r"'nope' matches nothing in a block; a block has self_attn.k_proj"):
        resolve_targets(opt, LoraSpec(target_modules=("nope",)))
    with pytest.raises(ModelError, match=r"'dense' also matches 'bert.pooler.dense' outside"):
        resolve_targets(bert, LoraSpec(target_modules=("dense",)))
    with pytest.raises(ModelError, match="rank"):
        resolve_targets(bert, LoraSpec(rank=0))
    with pytest.raises(ModelError, match="not resolved"):
        inject_lora(DeviceHalf(tiny_model(bert), 1), LoraSpec())
