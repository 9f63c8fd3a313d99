"""Our loader gives what transformers' own gives, bit for bit, from checkpoints of every make, and reads no more than it needs."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from sfl.errors import ModelError
from sfl.model.halves import load_device_half, load_edge_half
from sfl.model.load import load_config, load_task_model
from sfl.model.table import StoredEmbedding
from tests.tiny import CLASSIFIERS_ONLY, FAMILIES, save_tiny_model, tiny_batch, tiny_model

LABELS = ("a", "b", "c")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = [(f, t) for f in FAMILIES for t in ("classification", "causal-lm") if t == "classification" or f not in CLASSIFIERS_ONLY]


def by_transformers(path: Path, task: str, dtype: str, seed: int = 0) -> PreTrainedModel:
    auto: Any = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    config = load_config(path)
    config.use_cache = False
    if task == "classification":
        config.num_labels = len(LABELS)
        config.problem_type = "single_label_classification"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = auto.from_pretrained(path, config=config, dtype=DTYPES[dtype], ignore_mismatched_sizes=True)
    return model.eval()


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


def store_as(path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def rename(path: Path, new_name: Any) -> None:
    tensors = {new_name(name): tensor for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(("family", "task"), CASES)
@pytest.mark.parametrize(("stored", "dtype"), [("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "fp32")])
def test_every_tensor_and_every_logit_is_that_of_from_pretrained(
    family: str, task: str, stored: str, dtype: str, tmp_path: Path
) -> None:
    path = save_tiny_model(tmp_path, family)
    store_as(path, DTYPES[stored])
    expected = by_transformers(path, task, dtype, seed=3)
    loaded = load_task_model(path, task, LABELS if task == "classification" else (), dtype, seed=3)  # type: ignore[arg-type]
    theirs, ours = tensors_of(expected), tensors_of(loaded)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor), name
        assert ours[name].requires_grad == tensor.requires_grad
    ids, mask = tiny_batch(expected.config)
    logits = expected(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(loaded(input_ids=ids, attention_mask=mask).logits, logits)
    device = load_device_half(path, 2, dtype)  # type: ignore[arg-type]
    labels = LABELS if task == "classification" else ()
    edge = load_edge_half(path, task, 1, labels, dtype, seed=3)  # type: ignore[arg-type]
    hidden = device(ids, mask)
    assert hidden.dtype == DTYPES[dtype] and torch.equal(edge(hidden, mask, None, 2).logits, logits)
    tables = [module for module in device.modules() if isinstance(module, nn.Embedding)]
    assert tables and all(isinstance(t, StoredEmbedding) and t.table.dtype == DTYPES[stored] for t in tables)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_with_and_without_the_backbones_prefix(family: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, family)
    prefix = tiny_model(load_config(path)).base_model_prefix
    expected = tensors_of(load_task_model(path, "classification", LABELS, seed=1))

    def bare(name: str) -> str:
        return name.removeprefix(f"{prefix}.")

    def prefixed(name: str) -> str:
        return name if name.startswith((prefix, "lm_head", "embed_out")) else f"{prefix}.{name}"

    for new_name in (bare, prefixed):
        rename(path, new_name)
        theirs = tensors_of(by_transformers(path, "classification", "fp32", seed=1))
        loaded = tensors_of(load_task_model(path, "classification", LABELS, seed=1))
        for name, tensor in expected.items():
            assert torch.equal(loaded[name], tensor) and torch.equal(theirs[name], tensor), name


def test_old_names_of_layer_norms(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "bert")
    expected = tensors_of(load_task_model(path, "classification", LABELS))
    rename(path, lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"))
    assert any(name.endswith("gamma") for name in load_file(path / "model.safetensors"))
    for loaded in (load_task_model(path, "classification", LABELS), by_transformers(path, "classification", "fp32")):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors_of(loaded).items())


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt_neox", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_language_model_heads(family: str, tied: bool, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, family, tie_word_embeddings=tied)
    stored = load_file(path / "model.safetensors")
    head = "embed_out.weight" if family == "gpt_neox" else "lm_head.weight"
    assert (head in stored) != tied
    expected, loaded = by_transformers(path, "causal-lm", "fp32"), load_task_model(path, "causal-lm")
    embedding, output = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight  # type: ignore[no-untyped-call]
    assert torch.equal(output, expected.get_output_embeddings().weight)  # type: ignore[no-untyped-call]
    assert (embedding is output) == tied


def in_shards(path: Path, tmp_path: Path) -> Path:
    target = tmp_path / "shards"
    by_transformers(path, "causal-lm", "fp32").save_pretrained(target, max_shard_size="40KB")
    assert len(list(target.glob("*.safetensors"))) > 3
    return target


def test_a_half_opens_only_the_shards_that_it_needs(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "whole", "llama", tie_word_embeddings=False)
    shards = in_shards(path, tmp_path)
    ids, mask = tiny_batch(load_config(path))
    expected = load_device_half(path, 2)(ids, mask)
    index = json.loads((shards / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if "embed_tokens" in name or ".layers.0." in name or ".layers.1." in name}
    for file in set(index.values()) - needed:
        (shards / file).unlink()
    assert torch.equal(load_device_half(shards, 2)(ids, mask), expected)
    with pytest.raises(ModelError, match=r"lacks the weights file model-0000\d-of"):
        load_device_half(shards, 3)
    broken = shards / sorted(needed)[0]
    broken.write_bytes(broken.read_bytes()[:-1])
    with pytest.raises(ModelError, match=rf"{broken.name}' is truncated"):
        load_device_half(shards, 2)


def test_a_half_whose_weights_have_another_shape(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "opt")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "ffn_dim": 48}))
    for load in (lambda: load_device_half(path, 2), lambda: load_edge_half(path, "causal-lm", 2)):
        with pytest.raises(ModelError, match=r"another shape, the first being model\.decoder\.layers\.[02]\.fc1"):
            load()


def test_a_header_that_lies(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "opt")
    file = path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"dtype":"F32","shape":[64,32]', b'"dtype":"F16","shape":[64,32]'))
    with pytest.raises(ModelError, match="not as long as its shape asks for"):
        load_device_half(path, 2)
    file.write_bytes(whole.replace(b'"dtype":"F32","shape":[64,32]', b'"dtype":"F99","shape":[64,32]'))
    with pytest.raises(ModelError, match="unknown number format F99"):
        load_device_half(path, 2)


def test_a_mapped_weight_may_be_changed_and_its_file_is_not(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "opt")
    before = (path / "model.safetensors").read_bytes()
    model = load_task_model(path, "causal-lm")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert (path / "model.safetensors").read_bytes() == before


def test_an_embedding_reads_rows_of_any_order_and_refuses_others(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "opt")
    table = load_file(path / "model.safetensors")["model.decoder.embed_tokens.weight"]
    for compute, dtype in DTYPES.items():
        embedding = load_device_half(path, 2, "fp32", compute).backbone.get_input_embeddings()  # type: ignore[arg-type,operator]
        ids = torch.tensor([[5, 319, 0], [7, 6, 5]])
        assert torch.equal(embedding(ids), table.to(dtype)[ids])
        assert embedding(torch.empty(2, 0, dtype=torch.long)).shape == (2, 0, 32)
        for wrong in (-1, 320):
            with pytest.raises(ModelError, match=r"outside of 'model\.decoder.embed_tokens\.weight', which has 320 rows"):
                embedding(torch.tensor([3, wrong]))


_RESIDENT = """
    import resource, sys, torch
    from pathlib import Path
    from sfl.model.halves import load_device_half, load_edge_half

    def resident() -> int:  # bytes; anonymous memory and mapped files
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    load_device_half(sys.argv[1], 1)  # a tiny one, for what is imported on the way
    before = resident()
    half = load_device_half(sys.argv[2], 1, sys.argv[3])
    ids = torch.arange(1000, 200_000, 1000).reshape(1, -1)[:, :100]
    for _ in range(2):
        half(ids, torch.ones_like(ids))
    print(resident() - before)
    edge = load_edge_half(sys.argv[2], "classification", 1, ("a", "b"), sys.argv[3])
    print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_that_no_token_touches_are_never_resident(precision: str, tmp_path: Path) -> None:
    small = save_tiny_model(tmp_path / "small", "llama")
    path = save_tiny_model(tmp_path / "large", "llama", hidden=128)
    rows = 400_000  # a table of 205 MB, of which the file has holes only
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    widen_table(path / "model.safetensors", "model.embed_tokens.weight", rows)
    assert (path / "model.safetensors").stat().st_size > 200e6
    script = textwrap.dedent(_RESIDENT)
    done = subprocess.run(
        [sys.executable, "-c", script, str(small), str(path), precision],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    device, both = map(int, done.stdout.split())
    assert device < 30e6 and both < 60e6


def widen_table(file: Path, name: str, rows: int) -> None:
    """Put a table of zeros with more rows at the file's end, as a hole."""
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    data = raw[8 + length :]
    width = header[name]["shape"][1]
    start = -(-len(data) // 8) * 8
    header[name].update(shape=[rows, width], data_offsets=[start, start + rows * width * 4])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text + data)
        stream.truncate(8 + len(text) + start + rows * width * 4)
