from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from sfl import disk
from sfl.adapters import peft_format
from sfl.adapters.layout import AdapterLayout, LoraSpec
from sfl.adapters.state import HEAD, AdapterKey, AdapterState
from sfl.errors import AdapterError
from tests.tiny import tiny_batch, tiny_config, tiny_model

BLOCKS = {
    "opt": ("model.decoder.layers", ("score",), ("q_proj", "v_proj")),
    "llama": ("model.layers", ("score",), ("q_proj", "v_proj")),
    "gpt2": ("transformer.h", ("score",), ("c_attn",)),
    "bert": ("bert.encoder.layer", ("classifier",), ("query", "value")),
    "roberta": ("roberta.encoder.layer", ("classifier",), ("query", "value")),
    "distilbert": ("distilbert.transformer.layer", ("pre_classifier", "classifier"), ("q_lin", "v_lin")),
}
CASES = [(family, "classification") for family in BLOCKS] + [(family, "causal-lm") for family in ("opt", "llama", "gpt2")]


def make(rank: int = 2) -> tuple[AdapterState, AdapterLayout]:
    """A small adapter for 2 layers of a made-up classifier."""
    rng = np.random.default_rng(0)
    state = {
        AdapterKey(layer, "attention.q", part): rng.normal(size=(rank, 3) if part == "A" else (4, rank)).astype("f4")
        for layer in range(2)
        for part in "AB"
    }
    state[AdapterKey(HEAD, "score", "weight")] = rng.normal(size=(2, 4)).astype("f4")
    lora = LoraSpec(2, 4.0, 0.1, ("attention.q",))
    labels, columns = ("benign", "scan"), ("proto", "duration")
    return state, AdapterLayout("base", "abc", "classification", lora, "model.layers", ("score",), 2, labels, columns, 32)


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    state, layout = make()
    peft_format.write(tmp_path / "v0", state, layout)
    again, same = peft_format.read(tmp_path / "v0")
    assert same == layout
    assert again.keys() == state.keys()
    assert all(np.array_equal(again[key], state[key]) for key in state)
    assert [path.name for path in tmp_path.iterdir()] == ["v0"]


def test_all_is_on_disk_before_the_folder_gets_its_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []

    def fsync(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (tmp_path / "v0").exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    peft_format.write(tmp_path / "v0", *make())
    before = {path.stat().st_ino for path in (tmp_path / "v0", *(tmp_path / "v0").iterdir())}
    assert len(before) == 5
    assert before == {inode for inode, named in synced if not named}
    assert [inode for inode, named in synced if named] == [tmp_path.stat().st_ino]


def test_a_folder_of_which_it_is_not_sure_that_it_lasts_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sync = disk.sync

    def failing(path: Path) -> None:
        if path == tmp_path and (tmp_path / "v0").exists():
            raise OSError("no space left on device")
        sync(path)

    monkeypatch.setattr(peft_format, "sync", failing)
    with pytest.raises(peft_format.AdapterWriteError, match="no space left"):
        peft_format.write(tmp_path / "v0", *make())
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    peft_format.write(tmp_path / "v0", *make())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "task"), CASES)
def test_peft_loads_it_on_the_uncut_model(tmp_path: Path, family: str, task: str) -> None:
    """An adapter that peft itself holds, taken out as data and written: a fresh uncut model with it gives equal logits."""
    blocks, head, targets = BLOCKS[family]
    config = tiny_config(family)
    lora = LoraSpec(2, 4.0, 0.0, targets)
    task_type = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}[task]
    head = head if task == "classification" else ()
    peft_config = LoraConfig(task_type=task_type, r=2, lora_alpha=4, target_modules=list(targets), modules_to_save=list(head))
    ours = get_peft_model(tiny_model(config, task), peft_config).eval()
    generator = torch.Generator().manual_seed(1)
    state: AdapterState = {}
    for name, parameter in ours.named_parameters():
        if not parameter.requires_grad:
            continue
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        path = name.removeprefix("base_model.model.")
        if path.startswith(f"{blocks}."):
            layer, _, rest = path.removeprefix(f"{blocks}.").partition(".")
            module, _, part = rest.removesuffix(".default.weight").partition(".lora_")
            key = AdapterKey(int(layer), module, part)
        else:
            module, _, part = path.replace(".modules_to_save.default", "").rpartition(".")
            key = AdapterKey(HEAD, module, part)
        state[key] = parameter.detach().numpy().copy()
    layout = AdapterLayout("base", "abc", task, lora, blocks, head, config.num_hidden_layers, ("a", "b", "c"))
    peft_format.write(tmp_path / "v0", state, layout)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(tiny_model(config, task), tmp_path / "v0").eval()
    assert not [str(w.message) for w in caught if "missing" in str(w.message)]
    ids, mask = tiny_batch(config)
    with torch.no_grad():
        want, got = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, loaded))
        base = tiny_model(config, task)(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(want, got)
    assert not torch.allclose(base, got)


def test_a_missing_folder_and_a_stranger_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no adapter folder"):
        peft_format.read(tmp_path / "v7")
    with pytest.raises(AdapterError, match="not written by sfl"):
        peft_format.read(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "no tensors", "bad json", "no labels", "other format", "tensor gone"])
def test_a_damaged_folder_is_named(tmp_path: Path, damage: str) -> None:
    state, layout = make()
    folder = tmp_path / "v0"
    if damage == "tensor gone":
        peft_format.write(tmp_path / "whole", state, layout)
        layout = AdapterLayout(**{**vars(layout), "num_layers": 1})
        peft_format.write(folder, {key: value for key, value in state.items() if key.layer != 1}, layout)
        (folder / "sfl.json").write_bytes((tmp_path / "whole" / "sfl.json").read_bytes())
    else:
        peft_format.write(folder, state, layout)
    tensors, about = folder / "adapter_model.safetensors", folder / "sfl.json"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-5])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage == "bad json":
        about.write_text(about.read_text()[:-9])
    elif damage in ("no labels", "other format"):
        document = json.loads(about.read_text())
        if damage == "no labels":
            del document["layout"]["labels"]
        else:
            document["format"] = 99
        about.write_text(json.dumps(document))
    with pytest.raises(AdapterError):
        peft_format.read(folder)


def test_an_adapter_that_does_not_fit_its_layout_is_not_written(tmp_path: Path) -> None:
    state, layout = make(rank=3)
    with pytest.raises(AdapterError, match="LoRA rank 2"):
        peft_format.write(tmp_path / "v0", state, layout)
    state, _ = make()
    gone = {"1/attention.q/B is missing": AdapterKey(1, "attention.q", "B"), "lacks": AdapterKey(HEAD, "score", "weight")}
    for problem, key in gone.items():
        with pytest.raises(AdapterError, match=problem):
            peft_format.write(tmp_path / "v0", {k: v for k, v in state.items() if k != key}, layout)
    with pytest.raises(AdapterError, match="no part of the task head"):
        peft_format.write(tmp_path / "v0", state | {AdapterKey(HEAD, "lm_head", "weight"): np.ones(2, "f4")}, layout)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    state, layout = make()
    peft_format.write(tmp_path / "v0", state, layout)
    with pytest.raises(AdapterError, match="exists already"):
        peft_format.write(tmp_path / "v0", state, layout)
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterError, match="cannot write"):
        peft_format.write(tmp_path / "file" / "v0", state, layout)
