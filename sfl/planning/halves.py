"""Both halves without weights, as the loader would make them, and the bytes that their weights would take."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sfl.adapters.layout import LoraSpec
from sfl.data.settings import Task
from sfl.model.cut import DeviceHalf, EdgeHalf, held_blocks
from sfl.model.frozen import FrozenLinear
from sfl.model.lora import AdapterSlots, inject_lora
from sfl.model.precision import DTYPES, freeze_linears
from sfl.model.quantised import QuantisedLinear
from sfl.model.skeleton import build_skeleton
from sfl.settings import Compute, Precision


def device_half(
    config: PretrainedConfig, lora: LoraSpec, precision: Precision, compute: Compute
) -> tuple[DeviceHalf, AdapterSlots]:
    """The half that holds all blocks but the last, on the meta device. `lora` must be resolved.

    Raises `ModelError` as `DeviceHalf` and `inject_lora` do.
    """
    half = DeviceHalf(_skeleton(config, "classification", compute), config.num_hidden_layers - 1)
    _freeze(half.own_blocks.values(), precision, compute)
    return half, inject_lora(half, lora)


def edge_half(
    config: PretrainedConfig, task: Task, classes: int, lora: LoraSpec, precision: Precision, compute: Compute
) -> tuple[EdgeHalf, AdapterSlots]:
    """The half that holds all blocks but the first, with the head of `task`; otherwise as `device_half`."""
    config = copy.deepcopy(config)
    config.pad_token_id = config.pad_token_id or 0  # the tokenizer would tell
    if task == "classification":
        config.num_labels = classes
        config.problem_type = "single_label_classification"
    model = _skeleton(config, task, compute)
    _freeze(held_blocks(model, 1), precision, compute)
    half = EdgeHalf(model, 1, DTYPES[compute])
    return half, inject_lora(half, lora)


def block_weights(half: DeviceHalf | EdgeHalf) -> dict[int, int]:
    """Bytes of each block's base weights and buffers, by block index."""
    return {index: _bytes_of(block) for index, block in half.own_blocks.items()}


def other_weights(half: DeviceHalf | EdgeHalf) -> int:
    """Bytes of what a half holds beside its blocks, less a device's embedding tables, which stay in their file."""
    total = _bytes_of(half) - sum(block_weights(half).values())
    if isinstance(half, DeviceHalf):
        total -= sum(module.weight.nbytes for module in half.modules() if isinstance(module, nn.Embedding))
    return total


def table_bytes(half: DeviceHalf, config: PretrainedConfig) -> int:
    """Bytes of the embedding tables in their file: in the format that the configuration names, fp32 where it does not."""
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return sum(module.weight.numel() * stored.itemsize for module in half.modules() if isinstance(module, nn.Embedding))


def adapter_bytes(slots: AdapterSlots) -> dict[int, int]:
    """Bytes of the trained tensors of each layer, fp32, the task head's under `HEAD`."""
    found: dict[int, int] = {}
    for key, (module, name) in slots.slots.items():
        found[key.layer] = found.get(key.layer, 0) + module.get_parameter(name).nbytes
    return found


def _skeleton(config: PretrainedConfig, task: Task, compute: Compute) -> PreTrainedModel:
    """With its computed tables on the meta device too."""
    model = build_skeleton(config, task, DTYPES[compute])
    nn.Module.to(model, "meta")
    return model


def _freeze(blocks: Iterable[nn.Module], precision: Precision, compute: Compute) -> None:
    """As the loader does, with weights that are on the meta device too."""
    blocks = list(blocks)
    freeze_linears(blocks, precision, compute)
    for layer in (module for block in blocks for module in block.modules()):
        if isinstance(layer, QuantisedLinear):
            shape = (layer.out_features, layer.kept_width())
            scale = torch.empty(layer.scale_shape(), device="meta")
            layer.hold(torch.empty(shape, dtype=layer.kept, device="meta"), scale)
        elif isinstance(layer, FrozenLinear):
            weight = torch.empty(layer.out_features, layer.in_features, dtype=DTYPES[precision], device="meta")
            layer.weight = nn.Parameter(weight, requires_grad=False)


def _bytes_of(module: nn.Module) -> int:
    """All that is not trained."""
    lora = {id(parameter) for name, parameter in module.named_parameters() if ".lora_" in f".{name}"}
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.nbytes for key, tensor in tensors.items() if not tensor.requires_grad and key not in lora)
