"""A half read from a checkpoint reads nothing else of it; that it is the half of the whole, test_weights shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from sfl.errors import ModelError
from sfl.model.halves import load_device_half, load_edge_half
from tests.tiny import save_tiny_model

LABELS = ("a", "b", "c")


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
