"""Frozen factors in PEFT's format: they come back, and PEFT applies them with the trained ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from sfl.adapters import peft_format
from sfl.adapters.layout import AdapterLayout, LoraSpec
from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState
from sfl.errors import AdapterError
from tests.tiny import tiny_batch, tiny_config, tiny_model

RANK, ALPHA, LAYERS = 2, 5.0, 2


def state_of(model: torch.nn.Module, blocks: str, targets: tuple[str, ...], head: str, frozen: list[int]) -> AdapterState:
    """Random factors for each target of each block, with `frozen` many frozen ones in turn (-1: no such tensors)."""
    rng = np.random.default_rng(3)
    state: AdapterState = {}
    for layer in range(LAYERS):
        for index, (name, module) in enumerate(sorted(model.get_submodule(f"{blocks}.{layer}").named_modules())):
            if name.rpartition(".")[2] not in targets:
                continue
            out, into = module.weight.shape if isinstance(module, torch.nn.Linear) else module.weight.shape[::-1]
            count = frozen[(layer + index) % len(frozen)]
            sizes = {"A": (RANK, into), "B": (out, RANK)}
            sizes |= {FROZEN_A: (count, into), FROZEN_B: (out, count)} if count >= 0 else {}
            for part, size in sizes.items():
                state[AdapterKey(layer, name, part)] = rng.normal(0, 0.3, size).astype("f4")
    for name, parameter in model.get_submodule(head).named_parameters():
        state[AdapterKey(HEAD, head, name)] = rng.normal(0, 0.3, tuple(parameter.shape)).astype("f4")
    return state


CASES = {
    "opt": ("model.decoder.layers", "score", ("q_proj", "v_proj")),
    "bert": ("bert.encoder.layer", "classifier", ("query", "value")),
    "gpt2": ("transformer.h", "score", ("c_attn",)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", CASES)
@pytest.mark.parametrize("frozen", [[3], [5, -1, 1], [0, 4]], ids=str)
def test_peft_applies_trained_and_frozen_factors_at_one_scale(tmp_path: Path, family: str, frozen: list[int]) -> None:
    """Against the same products folded into the base by hand."""
    blocks, head, targets = CASES[family]
    config = tiny_config(family)
    by_hand = tiny_model(config, "classification")
    state = state_of(by_hand, blocks, targets, head, frozen)
    lora = LoraSpec(RANK, ALPHA, 0.0, targets)
    layout = AdapterLayout("base", "abc", "classification", lora, blocks, (head,), LAYERS, ("a", "b", "c"))
    peft_format.write(tmp_path / "v0", state, layout)

    again, same_layout = peft_format.read(tmp_path / "v0")
    assert same_layout == layout and again.keys() == state.keys()
    assert all(again[key].tobytes() == state[key].tobytes() for key in state)

    with torch.no_grad():
        for key in [key for key in state if key.part == "B"]:
            delta = state[key] @ state[key._replace(part="A")]
            if key._replace(part=FROZEN_B) in state:
                delta = delta + state[key._replace(part=FROZEN_B)] @ state[key._replace(part=FROZEN_A)]
            weight = by_hand.get_submodule(f"{blocks}.{key.layer}.{key.module}").weight
            delta = torch.from_numpy(delta) * (ALPHA / RANK)
            weight += delta if weight.shape == delta.shape else delta.T
        for name, parameter in by_hand.get_submodule(head).named_parameters():
            parameter.copy_(torch.from_numpy(state[AdapterKey(HEAD, head, name)]))
    loaded = PeftModel.from_pretrained(tiny_model(config, "classification"), tmp_path / "v0").eval()
    ids, mask = tiny_batch(config)
    with torch.no_grad():
        want = by_hand.eval()(input_ids=ids, attention_mask=mask).logits
        got = loaded(input_ids=ids, attention_mask=mask).logits
        base = tiny_model(config, "classification").eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, got, atol=1e-2)


def made(frozen: int = 3) -> tuple[AdapterState, AdapterLayout]:
    """A small adapter for 2 layers, with frozen factors in the first."""
    rng = np.random.default_rng(0)
    state = {
        AdapterKey(layer, "attention.q", part): rng.normal(size=(2, 3) if part == "A" else (4, 2)).astype("f4")
        for layer in range(2)
        for part in "AB"
    }
    state[AdapterKey(0, "attention.q", FROZEN_A)] = rng.normal(size=(frozen, 3)).astype("f4")
    state[AdapterKey(0, "attention.q", FROZEN_B)] = rng.normal(size=(4, frozen)).astype("f4")
    layout = AdapterLayout("base", "abc", "causal-lm", LoraSpec(2, 4.0, 0.1, ("q",)), "model.layers", (), 2)
    return state, layout


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({FROZEN_B: None}, "0/attention.q/frozen_B is missing"),
        ({FROZEN_A: (2, 3)}, r"have shapes \(2, 3\) and \(4, 3\), which do not go together"),
        ({FROZEN_A: (3, 5)}, "do not go together"),
        ({FROZEN_A: (3,)}, "do not go together"),
    ],
)
def test_frozen_factors_that_do_not_go_together_are_not_written(tmp_path: Path, change: dict, reason: str) -> None:
    state, layout = made()
    for part, shape in change.items():
        key = AdapterKey(0, "attention.q", part)
        if shape is None:
            del state[key]
        else:
            state[key] = np.ones(shape, "f4")
    with pytest.raises(AdapterError, match=reason):
        peft_format.write(tmp_path / "v0", state, layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("frozen", [{"0/attention.q": 99}, {"0/attention.q": -1}, {"nonsense": 1}, {"0/attention.q": "x"}, []])
def test_a_wrong_count_of_frozen_factors_is_named(tmp_path: Path, frozen: object) -> None:
    peft_format.write(tmp_path / "v0", *made())
    path = tmp_path / "v0" / "sfl.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"frozen": frozen}))
    with pytest.raises(AdapterError):
        peft_format.read(tmp_path / "v0")


def test_an_adapter_without_frozen_factors_is_written_as_it_always_was(tmp_path: Path) -> None:
    state, layout = made()
    trained = {key: value for key, value in state.items() if key.part in ("A", "B")}
    peft_format.write(tmp_path / "v0", trained, layout)
    config = json.loads((tmp_path / "v0" / "adapter_config.json").read_text())
    about = json.loads((tmp_path / "v0" / "sfl.json").read_text())
    assert (config["r"], config["lora_alpha"], about.keys()) == (2, 4.0, {"format", "layout"})


def test_more_files_are_written_with_the_adapter(tmp_path: Path) -> None:
    peft_format.write(tmp_path / "v0", *made(), extras={"more.bin": b"123"})
    assert (tmp_path / "v0" / "more.bin").read_bytes() == b"123"
    peft_format.read(tmp_path / "v0")
