"""Frozen linear layers: what is kept, what they compute, and what they hold while they do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sfl.errors import ModelError
from sfl.model.checkpoint import StoredTensor, WeightsFile
from sfl.model.frozen import CastLinear, FrozenLinear
from sfl.model.quantised import Int8Linear

OUT, IN = 200, 136


def stored(weight: Tensor, tmp_path: Path) -> StoredTensor:
    save_file({"weight": weight.contiguous()}, tmp_path / "model.safetensors")
    return WeightsFile(tmp_path / "model.safetensors").tensors["weight"]


def weight_of(rows: int = OUT, columns: int = IN) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) * torch.logspace(-3, 1, rows)[:, None]


def made(kind: str, weight: Tensor, tmp_path: Path, bias: Tensor | None, transposed: bool = False) -> FrozenLinear:
    """A frozen layer of `weight` (out, in), which is stored as (in, out) where `transposed`."""
    with torch.device("meta"):
        like = Conv1D(len(weight), weight.shape[1]) if transposed else nn.Linear(weight.shape[1], len(weight), bias is not None)
    layer = Int8Linear(like, transposed) if kind == "int8" else CastLinear(like, transposed, getattr(torch, kind))
    layer.take(stored(weight.t() if transposed else weight, tmp_path), None)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]
    return layer


def run(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_(True)
    result = layer(x)
    (result * gradient).sum().backward()
    assert x.grad is not None
    return result.detach(), x.grad


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, gradient, bias = (torch.randn(*shape, generator=generator) for shape in ((2, 5, IN), (2, 5, OUT), (OUT,)))
    return x.to(dtype), gradient.to(dtype), bias.to(dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("slab", [1 << 10, 1 << 24])
def test_int8_is_symmetric_with_a_scale_for_each_row(
    transposed: bool, slab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.model.frozen._SLAB", {"cpu": slab})
    weight = weight_of()
    weight[3] = 0
    x, gradient, bias = inputs(torch.float32)
    layer = made("int8", weight, tmp_path, bias, transposed)
    assert layer.weight.dtype == torch.int8 and layer.weight.shape == (OUT, IN) and layer.scale.shape == (OUT,)
    kept = layer.weight.float() * layer.scale[:, None]
    assert (kept - weight).abs().amax(dim=1).le(layer.scale / 2 * 1.0001).all()
    torch.testing.assert_close(kept.abs().amax(dim=1), weight.abs().amax(dim=1))
    assert int(layer.weight.min()) >= -127
    plain = nn.Linear(IN, OUT)
    plain.weight, plain.bias = nn.Parameter(kept), nn.Parameter(bias)
    for ours, theirs in zip(run(layer, x, gradient), run(plain, x, gradient), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "bfloat16", "float32"])
def test_bf16_activations_are_as_close_as_bf16_allows(kind: str, tmp_path: Path) -> None:
    x, gradient, bias = inputs(torch.bfloat16)
    layer = made(kind, weight_of() / 10, tmp_path, bias)
    exact = nn.Linear(IN, OUT).double()
    kept = layer.weight.double() * (1 if layer.row_scale() is None else layer.scale.double()[:, None])
    exact.weight, exact.bias = nn.Parameter(kept), nn.Parameter(bias.double())
    for ours, theirs in zip(run(layer, x, gradient), run(exact, x.double(), gradient.double()), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_cast_weight_computes_as_its_copy_in_the_other_format(transposed: bool, tmp_path: Path) -> None:
    weight, (x, gradient, bias) = weight_of(), inputs(torch.float32)
    layer = made("bfloat16", weight, tmp_path, bias, transposed)
    plain = nn.Linear(IN, OUT)
    plain.weight, plain.bias = nn.Parameter(weight.bfloat16().float()), nn.Parameter(bias)
    for ours, theirs in zip(run(layer, x, gradient), run(plain, x, gradient), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_slab_is_larger_than_allowed_and_nothing_is_saved_for_the_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.model.frozen._SLAB", {"cpu": 64 * IN * 4})
    layer = made("int8", weight_of(), tmp_path, None)
    seen: list[int] = []
    for name in ("rows", "columns"):
        plain = getattr(layer, name)

        def counted(first: int, last: int, dtype: torch.dtype, plain: object = plain) -> Tensor:
            slab: Tensor = plain(first, last, dtype)  # type: ignore[operator]
            seen.append(slab.numel())
            return slab

        monkeypatch.setattr(layer, name, counted)
    x, gradient, _ = inputs(torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        run(layer, x, gradient)
    assert len(seen) >= 7 and max(seen) <= 64 * OUT < OUT * IN / 2
    assert all(tensor.shape == gradient.shape for tensor in kept)  # of the test's own product


def test_weights_that_are_not_finite(tmp_path: Path) -> None:
    weight = weight_of()
    weight[4, 4] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        made("int8", weight, tmp_path, None)
