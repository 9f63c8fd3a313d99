"""A packed half is a model folder: small, always the same, and it loads to the very half of the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfl.errors import ModelError, SettingsError
from sfl.model.fingerprint import model_fingerprint
from sfl.model.halves import load_device_half, load_edge_half
from sfl.model.load import load_task_model, load_tokenizer
from sfl.model.pack import pack_device_half
from sfl.model.packed import FORMAT
from sfl.model.source import model_source
from sfl.model.table import StoredEmbedding
from tests.tiny import FAMILIES, save_tiny_model, tiny_batch

PRECISIONS = ("fp32", "bf16", "int8", "nf4")


def tensors_of(half: nn.Module) -> dict[str, Tensor]:
    tables = {f"{n}.table": m.table.read(m.table.dtype) for n, m in half.named_modules() if isinstance(m, StoredEmbedding)}
    assert tables
    return {**dict(half.named_parameters()), **dict(half.named_buffers()), **tables}


def require_bitsandbytes(precision: str) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        (family, precision)
        for precision in PRECISIONS
        for family in (FAMILIES if precision == "int8" else ("opt", "gpt2", "bert"))
    ],
)
def test_the_packed_half_is_the_half_of_the_whole(family: str, precision: str, tmp_path: Path) -> None:
    require_bitsandbytes(precision)
    path, folder = save_tiny_model(tmp_path / "whole", family), tmp_path / "half"
    pack_device_half(path, 2, precision, folder)  # type: ignore[arg-type]
    assert model_fingerprint(folder) == model_fingerprint(path)
    assert (folder / "config.json").read_bytes() == (path / "config.json").read_bytes()
    text = "proto tcp service http"
    assert load_tokenizer(folder)(text).input_ids == load_tokenizer(path)(text).input_ids
    for cut in (2, 1):
        for compute in (None, "fp32"):
            whole = load_device_half(path, cut, precision, compute)  # type: ignore[arg-type]
            half = load_device_half(folder, cut, precision, compute)  # type: ignore[arg-type]
            expected, packed = tensors_of(whole), tensors_of(half)
            assert packed.keys() == expected.keys()
            for name, tensor in expected.items():
                assert packed[name].dtype == tensor.dtype and torch.equal(packed[name], tensor), name
            ids, mask = tiny_batch(whole.config)
            assert torch.equal(half(ids, mask), whole(ids, mask))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_file_holds_the_half_alone_and_is_always_the_same(precision: str, tmp_path: Path) -> None:
    require_bitsandbytes(precision)
    path = save_tiny_model(tmp_path / "whole", "opt", hidden=128)
    for name in ("a", "b"):
        pack_device_half(path, 2, precision, tmp_path / name)  # type: ignore[arg-type]
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    pack_device_half(tmp_path / "a", 2, precision, tmp_path / "c")  # type: ignore[arg-type]  # from a half that is packed
    assert (tmp_path / "c" / "model.safetensors").read_bytes() == (tmp_path / "a" / "model.safetensors").read_bytes()
    tensors = load_file(tmp_path / "a" / "model.safetensors")  # by the library's own reader, which checks the layout
    assert not any(name.startswith(("model.decoder.layers.2.", "lm_head", "model.decoder.final")) for name in tensors)
    linear = [tensor for name, tensor in tensors.items() if name.endswith(("proj.weight", "fc1.weight", "fc2.weight"))]
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "nf4": torch.uint8}[precision]
    assert len(linear) == 12 and {tensor.dtype for tensor in linear} == {kept}
    assert {tensor.dtype for name, tensor in tensors.items() if "embed" in name or "bias" in name} == {torch.float32}
    size = sum(tensor.nbytes for tensor in tensors.values())
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < size + 8000
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    fingerprint = model_fingerprint(path)
    assert json.loads((tmp_path / "a" / "sfl.json").read_text()) == {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "source": model_source(path, fingerprint),
        "cut": 2,
        "precision": precision,
    }


@pytest.mark.parametrize("precision", PRECISIONS)
def test_room_is_asked_for_before_anything_is_written(precision: str, tmp_path: Path) -> None:
    require_bitsandbytes(precision)
    path, folder = save_tiny_model(tmp_path / "whole", "gpt2"), tmp_path / "half"
    asked: list[int] = []

    def refuse(size: int) -> None:
        asked.append(size)
        raise SettingsError("the disk is full")

    with pytest.raises(SettingsError, match="the disk is full"):
        pack_device_half(path, 2, precision, folder, refuse)  # type: ignore[arg-type]
    assert not folder.exists()
    pack_device_half(path, 2, precision, folder, asked.append)  # type: ignore[arg-type]
    written = sum(file.stat().st_size for file in folder.iterdir() if file.name != "sfl.json")
    assert asked == [written, written]


def test_a_checkpoint_stored_in_bf16_does_not_grow(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "whole", "gpt2")
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(path / "model.safetensors").items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    for precision in ("fp32", "bf16"):
        pack_device_half(path, 1, precision, tmp_path / precision)  # type: ignore[arg-type]
        assert {t.dtype for t in load_file(tmp_path / precision / "model.safetensors").values()} == {torch.bfloat16}
        half, whole = (tensors_of(load_device_half(p, 1, precision)) for p in (tmp_path / precision, path))  # type: ignore[arg-type]
        assert all(torch.equal(half[name], tensor) for name, tensor in whole.items())


def test_what_a_packed_half_cannot_give(tmp_path: Path) -> None:
    path, folder = save_tiny_model(tmp_path / "whole", "llama"), tmp_path / "half"
    pack_device_half(path, 2, "int8", folder)
    for cut, precision in ((3, "int8"), (2, "fp32"), (1, "bf16")):
        with pytest.raises(ModelError, match=rf"packed for cuts up to 2 in int8, not for cut {cut} in {precision}"):
            load_device_half(folder, cut, precision)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match="packed for cuts up to 2"):
            pack_device_half(folder, cut, precision, tmp_path / "other")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="a device's half alone, up to cut 2: take the whole model"):
        load_edge_half(folder, "causal-lm", 2)
    with pytest.raises(ModelError, match="a device's half alone"):
        load_task_model(folder, "causal-lm")
    numbers = ('"x"', "Infinity")
    notes = [f'{{"format": {FORMAT}, "cut": {cut}, "fingerprint": "", "source": "", "precision": ""}}' for cut in numbers]
    for text in ("{}", "[]", "no json", '{"format": 1}', *notes):
        (folder / "sfl.json").write_text(text)
        with pytest.raises(ModelError, match=r"sfl\.json"):
            model_fingerprint(folder)


def test_an_fp32_half_may_be_quantised_later(tmp_path: Path) -> None:
    path, folder = save_tiny_model(tmp_path / "whole", "bert"), tmp_path / "half"
    pack_device_half(path, 2, "fp32", folder)
    half, whole = (tensors_of(load_device_half(p, 2, "int8")) for p in (folder, path))
    assert all(torch.equal(half[name], tensor) for name, tensor in whole.items())


def test_a_cut_or_a_checkpoint_that_cannot_be_packed(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "whole", "llama")
    with pytest.raises(ModelError, match="between 1 and 3"):
        pack_device_half(path, 4, "int8", tmp_path / "half")
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        pack_device_half(path, 2, "int8", tmp_path / "half")
    assert not (tmp_path / "half").exists()
    pack_device_half(path, 1, "int8", tmp_path / "half")


@pytest.mark.parametrize("shape", [None, (3,)])
def test_a_quantised_weight_without_its_scale_is_refused(tmp_path: Path, shape: tuple[int, ...] | None) -> None:
    model = save_tiny_model(tmp_path / "model", "opt")
    packed = tmp_path / "packed"
    pack_device_half(model, 2, "int8", packed)
    tensors = load_file(packed / "model.safetensors")
    name = next(name for name in tensors if name.endswith(".scale"))
    del tensors[name]
    if shape is not None:
        tensors[name] = torch.ones(shape)
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"is quantised and needs a scale of shape \(\d+,\), but has"):
        load_device_half(packed, 2, "int8")
