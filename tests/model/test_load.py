"""Loading from a directory: what a user gets, and what they are told when it cannot be."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfl.errors import ModelError
from sfl.model.fingerprint import model_fingerprint
from sfl.model.load import check_max_length, load_config, load_task_model, load_tokenizer
from tests.tiny import CLASSIFIERS_ONLY, FAMILIES, save_tiny_model, tiny_config

LABELS = ("benign", "malicious")


@pytest.fixture()
def bert(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "bert", "bert")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_for_each_of_its_tasks(family: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, family)
    tokenizer = load_tokenizer(path)
    batch = tokenizer(["proto tcp service http", "udp"], padding=True, return_tensors="pt")
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    assert inputs["attention_mask"].sum() < inputs["attention_mask"].numel()
    model = load_task_model(path, "classification", LABELS)
    assert model(**inputs).logits.shape == (2, 2)
    assert model.config.id2label == {0: "benign", 1: "malicious"} and not model.training
    if family not in CLASSIFIERS_ONLY:
        logits = load_task_model(path, "causal-lm")(**inputs).logits
        assert logits.shape == (*inputs["input_ids"].shape, 320)


def test_missing_head_depends_on_the_seed_alone(bert: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    first = load_task_model(bert, "classification", LABELS, seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(4)
    again, other = (load_task_model(bert, "classification", LABELS, seed=seed) for seed in (1, 2))
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    stored = load_file(bert / "model.safetensors")["encoder.layer.0.output.dense.weight"]
    assert torch.equal(other.bert.encoder.layer[0].output.dense.weight, stored)


def test_head_in_the_checkpoint_is_kept_or_replaced_where_the_classes_differ(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "bert", "classification", labels=3)
    stored = load_file(path / "model.safetensors")["classifier.weight"]
    assert torch.equal(load_task_model(path, "classification", ("a", "b", "c")).classifier.weight, stored)
    assert load_task_model(path, "classification", LABELS).classifier.weight.shape == (2, 32)


def test_bf16(bert: Path) -> None:
    assert {p.dtype for p in load_task_model(bert, "classification", LABELS, "bf16").parameters()} == {torch.bfloat16}
    with pytest.raises(ModelError, match="dtype 'int8' is unknown"):
        load_task_model(bert, "classification", LABELS, "int8")  # type: ignore[arg-type]


def test_pad_token_falls_back_to_the_end_of_text(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "gpt2", pad_token_id=None)
    edited = json.loads((path / "tokenizer_config.json").read_text())
    edited.pop("pad_token")
    (path / "tokenizer_config.json").write_text(json.dumps(edited))
    tokenizer = load_tokenizer(path)
    assert tokenizer.pad_token == tokenizer.eos_token
    assert load_task_model(path, "classification", LABELS).config.pad_token_id == tokenizer.eos_token_id


def test_no_model_there(tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (tmp_path / "nope", "./nope", "/nope"):
        with pytest.raises(ModelError, match=r"there is no model directory '.*nope'"):
            load_config(name)
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"there is no model directory 'models/nope', .* as there is a folder 'models' here"):
        load_config("models/nope")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config.json"):
        load_task_model(tmp_path / "empty", "classification", LABELS)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for load in (load_config, load_tokenizer, model_fingerprint):
        with pytest.raises(ModelError, match="'nobody/nothing' is neither a directory nor a model that the Hugging Face hub"):
            load("nobody/nothing")


def test_a_hub_out_of_reach_is_one_error(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", pauses.append)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    level = logging.getLogger("huggingface_hub").level
    with pytest.raises(ModelError, match="'nobody/nothing' is neither a directory nor a model that the Hugging Face hub"):
        load_config("nobody/nothing")
    assert pauses and "Retrying" not in caplog.text
    assert logging.getLogger("huggingface_hub").level == level


def test_weights_that_are_not_safetensors(bert: Path) -> None:
    (bert / "model.safetensors").unlink()
    torch.save({}, bert / "pytorch_model.bin")
    for load in (lambda: load_task_model(bert, "classification", LABELS), lambda: model_fingerprint(bert)):
        with pytest.raises(ModelError, match=r"no weights in safetensors.*never loaded.*save_pretrained"):
            load()


@pytest.mark.parametrize("keep", [0, 4, 100, 40000, -1])
def test_truncated_weights(bert: Path, keep: int) -> None:
    whole = (bert / "model.safetensors").read_bytes()
    (bert / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(ModelError, match="truncated"):
        load_task_model(bert, "classification", LABELS)
    with pytest.raises(ModelError, match="truncated"):
        model_fingerprint(bert)


def test_missing_weights_outside_the_head(bert: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    del tensors["encoder.layer.1.output.dense.weight"]
    save_file(tensors, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*bert\.encoder\.layer\.1\.output\.dense\.weight"):
        load_task_model(bert, "classification", LABELS)


def test_weights_of_another_shape(bert: Path) -> None:
    config = json.loads((bert / "config.json").read_text())
    (bert / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match="in another shape"):
        load_task_model(bert, "classification", LABELS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [('{"model_type": "foo"}', "unknown model type; .*opt, gpt2"), ("{", "not a valid JSON"), ("{}", "unknown")],
)
def test_bad_config(bert: Path, text: str, reason: str) -> None:
    (bert / "config.json").write_text(text)
    with pytest.raises(ModelError, match=reason):
        load_config(bert)


def test_wrong_task_or_labels(bert: Path) -> None:
    with pytest.raises(ModelError, match="no task 'causal-lm'"):
        load_task_model(bert, "causal-lm")
    for labels in ((), ("a",), ("a", "a")):
        with pytest.raises(ModelError, match="two or more different labels"):
            load_task_model(bert, "classification", labels)


def test_max_length() -> None:
    for family in ("bert", "gpt2", "llama", "roberta", "opt"):
        check_max_length(tiny_config(family), 128)
        with pytest.raises(ModelError, match="129 tokens is more than this model takes: at most 128"):
            check_max_length(tiny_config(family), 129)
    with pytest.raises(ModelError, match="too short"):
        check_max_length(tiny_config("bert"), 0)


def test_fingerprint_is_of_the_weights_and_not_of_the_files(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "a", "llama", layers=2)
    first = model_fingerprint(path)
    assert first == model_fingerprint(save_tiny_model(tmp_path / "b", "llama", layers=2)) and len(first) == 64
    assert first != model_fingerprint(save_tiny_model(tmp_path / "c", "llama", layers=2, seed=1))
    load_task_model(path, "causal-lm").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert model_fingerprint(tmp_path / "shards") == first
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][-1, -1] += 1e-3
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    assert model_fingerprint(path) != first
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(ModelError, match="lacks the weights file model-0000"):
        model_fingerprint(tmp_path / "shards")


def test_code_that_a_configuration_names_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"model_type": "sfl-unheard-of", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "configuration_mine.py").write_text("raise SystemExit('the code ran')\n", encoding="utf-8")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError):
        load_config(tmp_path)
