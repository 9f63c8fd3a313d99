"""Halves whose frozen base is kept in fewer bits: close to the whole model, trained through LoRA, and light."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import device_half, edge_half
from sfl.errors import ModelError
from sfl.model.frozen import CastLinear, FrozenLinear
from sfl.model.halves import load_device_half, load_edge_half
from sfl.model.lora import head_state, initial_adapter, inject_lora, resolve_targets
from sfl.model.precision import require_runnable
from sfl.model.quantised import Int8Linear, Nf4Linear
from tests.tiny import FAMILIES, save_tiny_model, tiny_batch

LABELS = ("a", "b", "c")
KEPT: dict[tuple[str, str], type[nn.Module]] = {
    ("int8", "fp32"): Int8Linear,
    ("int8", "bf16"): Int8Linear,
    ("nf4", "bf16"): Nf4Linear,
    ("bf16", "fp32"): CastLinear,
    ("fp32", "bf16"): CastLinear,
}


def halves(path: Path, precision: str, compute: str | None = None) -> tuple[Any, Any]:
    device = load_device_half(path, 2, precision, compute)  # type: ignore[arg-type]
    return device, load_edge_half(path, "classification", 2, LABELS, precision, compute, seed=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("family", "precision", "compute"),
    [(f, *case) for case in KEPT for f in (FAMILIES if case == ("int8", "bf16") else ("opt", "gpt2", "llama"))],
)
def test_a_half_computes_nearly_the_same(family: str, precision: str, compute: str, tmp_path: Path) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    path = save_tiny_model(tmp_path, family)
    device, edge = halves(path, "fp32")
    ids, mask = tiny_batch(device.config)
    hidden = device(ids, mask)
    logits = edge(hidden, mask, None, 2).logits
    low, high = halves(path, precision, compute)
    for half in (low, high):
        linear = [m for block in half.own_blocks.values() for m in block.modules() if isinstance(m, nn.Linear)]
        assert linear and all(type(module) is KEPT[precision, compute] for module in linear)
        assert not any(isinstance(module, FrozenLinear) for name in half.head for module in half.head[name].modules())
    ours = low(ids, mask)
    assert ours.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[compute]
    allowed = 0.35 if precision == "nf4" else 0.05
    assert 0 < (ours.float() - hidden)[mask.bool()].norm() < allowed * hidden[mask.bool()].norm()
    result = high(hidden, mask, None, 2).logits
    assert (result.float() - logits).norm() < allowed * logits.norm()


@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "phi3", "bert"])
@pytest.mark.parametrize("precision", ["int8", "nf4"])
def test_lora_trains_on_a_quantised_base(family: str, precision: str, tmp_path: Path) -> None:
    if precision == "nf4":
        pytest.importorskip("bitsandbytes", reason="nf4 needs bitsandbytes")
    device, edge = halves(save_tiny_model(tmp_path, family), precision)
    lora = resolve_targets(device.config, LoraSpec(rank=4, target_modules=("all-linear",)))
    state = initial_adapter(device.config, "classification", lora, head_state(edge), seed=0)
    blocks = [*device.own_blocks.values(), *edge.own_blocks.values()]
    before = [parameter.clone() for block in blocks for parameter in block.parameters()]
    low, high = inject_lora(device, lora), inject_lora(edge, lora)
    mounted = low.parameters_for(device_half(state, 2), 2), high.parameters_for(edge_half(state, 2), 2)
    low.mount(mounted[0])
    high.mount(mounted[1])
    parameters = [parameter for half in mounted for parameter in half.values()]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    ids, mask = tiny_batch(device.config)
    labels = torch.tensor([0, 2, 1])
    losses = []
    for _ in range(6):
        sent = device(ids, mask)
        received = sent.detach().requires_grad_(True)
        loss = edge(received, mask, labels, 2).loss
        loss.backward()
        sent.backward(received.grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = [parameter for block in blocks for name, parameter in block.named_parameters() if "lora_" not in name]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


def test_a_half_keeps_the_bytes_that_its_precision_says(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "opt", hidden=64)
    plain = sum(m.weight.numel() for m in load_device_half(path, 2).own_blocks[0].modules() if isinstance(m, nn.Linear))
    bytes_of = {}
    for precision in ("fp32", "bf16", "int8"):
        linear = [m for m in load_device_half(path, 2, precision).own_blocks[0].modules() if isinstance(m, nn.Linear)]  # type: ignore[arg-type]
        bytes_of[precision] = sum(m.weight.nbytes + (m.scale.nbytes if isinstance(m, Int8Linear) else 0) for m in linear)
    rows = sum(m.out_features for m in linear)
    assert bytes_of == {"fp32": 4 * plain, "bf16": 2 * plain, "int8": plain + 4 * rows}


def test_int8_does_not_import_bitsandbytes(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "opt")
    script = """
        import sys
        from sfl.model.halves import load_device_half
        load_device_half(sys.argv[1], 2, "int8")
        sys.exit("bitsandbytes" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(path)], cwd=Path(__file__).parents[2], timeout=120, check=False
    )
    assert done.returncode == 0


def test_what_this_machine_cannot_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_tiny_model(tmp_path, "opt")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ModelError, match=r"this torch finds no GPU.*take run_on = cpu"):
        load_device_half(path, 2, run_on="cuda")
    require_runnable.cache_clear()
    monkeypatch.delitem(sys.modules, "sfl.model.bitsandbytes_nf4", raising=False)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(ModelError, match=r"nf4 needs bitsandbytes.*sfl\[quant\].*precision = int8"):
        load_device_half(path, 2, "nf4")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda *_: torch.zeros(64, 64, dtype=torch.bfloat16), "give wrong numbers"),
        (RuntimeError("no kernel image"), "do not run: no kernel image"),
    ],
)
def test_a_kernel_is_tried_before_it_is_trusted(wrong: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> object:
        if isinstance(wrong, Exception):
            raise wrong
        return wrong()

    require_runnable.cache_clear()
    monkeypatch.setattr(Int8Linear, "rows", broken)
    with pytest.raises(ModelError, match=f"int8 weights with bf16 activations on this machine's processor {reason}"):
        require_runnable("int8", "bf16", "cpu")
    require_runnable.cache_clear()
