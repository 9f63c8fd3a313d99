"""The bytes of weights are those that the loader then holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import byte_size
from sfl.model.cut import DeviceHalf, EdgeHalf
from sfl.model.halves import load_device_half, load_edge_half
from sfl.model.load import load_config
from sfl.model.local_adapter import LocalAdapter
from sfl.model.lora import inject_lora, resolve_targets
from sfl.model.pack import pack_device_half
from sfl.planning.halves import adapter_bytes, block_weights, device_half, edge_half, other_weights
from sfl.planning.plan import make_plan
from sfl.planning.request import PlanRequest
from sfl.settings import Compute, Precision
from sfl.state_file import write_state
from sfl.wire.split import OptimizerSpec, TrainingRules
from tests.tiny import save_tiny_model

LORA = LoraSpec(4, 8.0, 0.0, ())
FORMATS: list[tuple[Precision, Compute]] = [
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("bf16", "fp32"),
    ("int8", "bf16"),
    ("int8", "fp32"),
]


def held(half: DeviceHalf | EdgeHalf, without_tables: bool) -> int:
    tables = {id(module.weight) for module in half.modules() if without_tables and isinstance(module, nn.Embedding)}
    tensors = {id(tensor): tensor for tensor in (*half.parameters(), *half.buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if key not in tables)


@pytest.mark.parametrize(("precision", "compute"), FORMATS)
@pytest.mark.parametrize("family", ["opt", "opt-post-norm", "gpt2", "llama", "bert", "bloom"])
def test_a_devices_weights(family: str, precision: Precision, compute: Compute, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, family)
    config = load_config(folder)
    half, _ = device_half(config, resolve_targets(config, LORA), precision, compute)
    blocks = block_weights(half)
    for cut in (1, 3):
        real = load_device_half(folder, cut, precision, compute)
        expected = other_weights(half) + sum(blocks[index] for index in range(cut))
        assert expected == held(real, without_tables=True)


@pytest.mark.parametrize(("precision", "compute"), FORMATS)
@pytest.mark.parametrize("family", ["opt", "gpt2", "llama", "bert"])
def test_an_edges_weights(family: str, precision: Precision, compute: Compute, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, family)
    config = load_config(folder)
    half, slots = edge_half(config, "classification", 3, resolve_targets(config, LORA), precision, compute)
    real = load_edge_half(folder, "classification", 1, ("a", "b", "c"), precision, compute)
    head = {id(parameter) for module in real.head.values() for parameter in module.parameters()}
    trained = sum(parameter.nbytes for parameter in real.parameters() if id(parameter) in head)
    weights = other_weights(half) + sum(block_weights(half).values())
    assert weights == held(real, without_tables=False) - trained
    assert adapter_bytes(slots).keys() == {1, 2, 3, 1 << 20}


def test_nf4_takes_half_a_byte_and_a_scale_for_64_weights_of_a_row(tmp_path: Path) -> None:
    config = load_config(save_tiny_model(tmp_path, "opt"))
    lora = resolve_targets(config, LORA)
    int8, _ = device_half(config, lora, "int8", "bf16")
    nf4, _ = device_half(config, lora, "nf4", "bf16")
    sizes = [(32, 32)] * 4 + [(64, 32), (32, 64)]
    in_int8 = sum(rows * width + 4 * rows for rows, width in sizes)
    in_nf4 = sum(rows * (64 // 2 + 4) for rows, _ in sizes)  # a row of 32 is padded to 64
    assert block_weights(int8)[0] - block_weights(nf4)[0] == in_int8 - in_nf4


def test_adapter_bytes_are_those_of_a_local_adapter(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "opt")
    config = load_config(folder)
    lora = resolve_targets(config, LORA)
    _, slots = device_half(config, lora, "fp32", "fp32")
    half = load_device_half(folder, 2)
    real = inject_lora(half, lora)
    state = {key: module.get_parameter(name).detach().numpy() for key, (module, name) in real.slots.items()}
    adapter = LocalAdapter(real, state, 2, 0, OptimizerSpec())
    counted = adapter_bytes(slots)
    assert counted[0] + counted[1] == byte_size(adapter.values())


def test_a_checkpoint_and_a_half_take_what_is_planned_on_disk(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "opt")
    config = load_config(folder)
    lora = resolve_targets(config, LoraSpec(64, 8.0, 0.0, ()))
    half = load_device_half(folder, 2)
    real = inject_lora(half, lora)
    state = {key: module.get_parameter(name).detach().numpy() for key, (module, name) in real.slots.items()}
    adapter = LocalAdapter(real, state, 2, 0, OptimizerSpec("adamw", 0.1, 0.0), rules=TrainingRules(proximal=0.1))
    adapter.mount()
    for parameter in half.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    adapter.step(0.1)
    pending = {f"pending/{key}": value for key, value in adapter.take_progress().items()}
    written = write_state(tmp_path / "checkpoint", {}, adapter.state() | pending)
    (plan,) = (plan for plan in make_plan(config, PlanRequest(lora=lora)).cuts if plan.cut == 2)
    assert 0.9 * written <= plan.checkpoint_mb * 1e6 <= written
    pack_device_half(folder, 2, "fp32", tmp_path / "packed")
    on_disk = sum(path.stat().st_size for path in (tmp_path / "packed").glob("*.safetensors"))
    assert plan.half_mb * 1e6 == pytest.approx(on_disk, rel=0.1)
