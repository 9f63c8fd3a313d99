"""Halves read from a checkpoint are the halves of the whole model, and read nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sfl.errors import ModelError
from sfl.model.halves import load_device_half, load_edge_half
from sfl.model.load import load_task_model
from tests.tiny import CLASSIFIERS_ONLY, FAMILIES, save_tiny_model, tiny_batch

LABELS = ("a", "b", "c")
CASES = [(f, t) for f in FAMILIES for t in ("classification", "causal-lm") if t == "classification" or f not in CLASSIFIERS_ONLY]


@pytest.mark.parametrize(("family", "task"), CASES)
def test_loaded_halves_give_the_logits_of_the_loaded_whole(family: str, task: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, family)
    labels = LABELS if task == "classification" else ()
    whole = load_task_model(path, task, labels, seed=5)
    ids, mask = tiny_batch(whole.config)
    expected = whole(input_ids=ids, attention_mask=mask).logits
    edge, device = load_edge_half(path, task, 2, labels, seed=5), load_device_half(path, 2)
    assert torch.equal(edge(device(ids, mask), mask, None, 2).logits, expected)


def test_a_half_needs_no_weight_of_the_other(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "llama", tie_word_embeddings=False)
    tensors = load_file(path / "model.safetensors")

    def keep(first: int, last: int, others: tuple[str, ...]) -> None:
        kept = {
            name: t
            for name, t in tensors.items()
            if name.startswith((*(f"model.layers.{i}." for i in range(first, last)), *others))
        }
        assert 0 < len(kept) < len(tensors)
        save_file(kept, path / "model.safetensors", {"format": "pt"})

    keep(0, 2, ("model.embed_tokens",))
    load_device_half(path, 2)
    with pytest.raises(ModelError, match=r"model\.layers\.2\."):
        load_device_half(path, 3)
    keep(2, 4, ("model.norm", "lm_head"))
    load_edge_half(path, "causal-lm", 2)
    with pytest.raises(ModelError, match=r"model\.layers\.1\."):
        load_edge_half(path, "causal-lm", 1)


def test_cut_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "bert")
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="between 1 and 3"):
        load_device_half(path, 4)
    with pytest.raises(ModelError, match="between 1 and 3"):
        load_edge_half(path, "classification", 0, LABELS)
