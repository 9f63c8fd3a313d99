"""LoRA on either half, through peft: which modules, which tensors are trained, and what they start from."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState
from sfl.data.settings import Task
from sfl.errors import AdapterError, ModelError
from sfl.model.cut import DeviceHalf, EdgeHalf
from sfl.model.families import Family, family_of, require_task
from sfl.model.frozen_factors import FrozenFactors, FrozenSlots
from sfl.model.skeleton import build_skeleton

_ADAPTER = "default"  # peft's own name for an only adapter


def resolve_targets(config: PretrainedConfig, lora: LoraSpec) -> LoraSpec:
    """`lora` with its target modules spelt out, sorted and checked against the model.

    None become peft's default for the family; `("all-linear",)` becomes every linear module of a block. A name matches a
    module as peft matches it: by its whole path or by the path's end, as in `q_proj` or `attention.output.dense`.
    Raises `ModelError` for a bad rank, alpha or dropout, a name that matches nothing in a block, or one that matches outside.
    """
    family = family_of(config)
    if lora.rank < 1 or lora.alpha <= 0 or not 0 <= lora.dropout < 1:
        raise ModelError(
            f"LoRA needs a rank of 1 or more, an alpha above 0 and a dropout from 0 to below 1, not {lora.rank}, {lora.alpha}"
            f" and {lora.dropout}"
        )
    model = build_skeleton(config, "classification")  # which every family has; its blocks are those of any task
    linear = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    first_block = f"{family.blocks}.0."
    inside = [name.removeprefix(first_block) for name in linear if name.startswith(first_block)]
    outside = [name for name in linear if not name.startswith(f"{family.blocks}.")]
    targets = tuple(lora.target_modules)
    if targets == ("all-linear",):
        targets = tuple(inside)
    targets = tuple(sorted(set(targets or _default_targets(family))))  # the same whoever spells them in another order
    for target in targets:
        if not any(_matches(name, target) for name in inside):
            raise ModelError(f"LoRA target '{target}' matches nothing in a block; a block has {', '.join(inside)}")
        for name in outside:
            if _matches(name, target):
                raise ModelError(f"LoRA target '{target}' also matches '{name}' outside the blocks: give more of its path")
    return dataclasses.replace(lora, target_modules=targets)


def _default_targets(family: Family) -> tuple[str, ...]:
    return family.lora_targets or tuple(PEFT_TARGETS[family.model_type])


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def inject_lora(half: DeviceHalf | EdgeHalf, lora: LoraSpec) -> AdapterSlots:
    """Put LoRA layers into a half's blocks, freeze all else but the task head, and return the slots of what is trained.

    `lora` must be resolved. Until an adapter is mounted, A and B are zero and the half computes what its base does.
    LoRA and head are fp32 on any base; on a bf16 base a head's input is cast to fp32.
    """
    if not lora.target_modules:
        raise ModelError("the LoRA targets are not resolved: call resolve_targets first")
    half.requires_grad_(False)
    for block in half.own_blocks.values():
        _inject(block, lora)
        for _, layer in _lora_layers(block):
            for linear in (layer.lora_A[_ADAPTER], layer.lora_B[_ADAPTER]):
                shape, base = linear.get_parameter("weight").shape, layer.get_base_layer().get_parameter("weight")
                linear.weight = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=base.device))
    for module in half.head.values():
        module.float().requires_grad_(True)
        module.register_forward_pre_hook(_cast_to_fp32)
    return AdapterSlots(half)


def _inject(block: nn.Module, lora: LoraSpec) -> None:
    peft_config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft computes alpha / r, whatever the type
        lora_dropout=lora.dropout,
        target_modules=list(lora.target_modules),
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in block.modules()),  # its weight is (in, out)
    )
    # On the meta device: the weights come from an adapter, so peft need not draw any from the global generator.
    inject_adapter_in_model(peft_config, block, _ADAPTER, low_cpu_mem_usage=True)


def _lora_layers(block: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    return ((name, module) for name, module in block.named_modules() if isinstance(module, LoraLayer))


def _cast_to_fp32(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.float() for value in inputs)


class AdapterSlots:
    """Where an adapter's tensors go in an injected half: one base, and any number of adapters mounted in turn.

    A session keeps its own parameters and optimiser; mounting them swaps pointers and copies nothing.
    """

    def __init__(self, half: DeviceHalf | EdgeHalf) -> None:
        self._at_edge = isinstance(half, EdgeHalf)
        self._lowest_cut = half.lowest_cut if isinstance(half, EdgeHalf) else half.cut
        self.slots: dict[AdapterKey, tuple[nn.Module, str]] = {}
        layers: dict[tuple[int, str], LoraLayer] = {}
        for index, block in half.own_blocks.items():
            for name, layer in _lora_layers(block):
                layers[index, name] = layer
                self.slots[AdapterKey(index, name, "A")] = (layer.lora_A[_ADAPTER], "weight")
                self.slots[AdapterKey(index, name, "B")] = (layer.lora_B[_ADAPTER], "weight")
        for key, module in _head_tensors(half.head):
            self.slots[key] = (module, key.part)
        self._shapes = {key: tuple(self._current(key).shape) for key in self.slots}
        self._frozen = FrozenSlots(layers, _ADAPTER)

    def keys(self, cut: int) -> set[AdapterKey]:
        """The tensors that this half trains when the cut is `cut`. Raises `ModelError` where it cannot serve that cut."""
        if (cut < self._lowest_cut) if self._at_edge else (cut != self._lowest_cut):
            raise ModelError(f"this half was cut {'from' if self._at_edge else 'at'} {self._lowest_cut}, not at {cut}")
        return {key for key in self.slots if not self._at_edge or key.layer >= cut}

    def parameters_for(self, state: AdapterState, cut: int, rank: int = 0) -> dict[AdapterKey, nn.Parameter]:
        """A session's own trainable fp32 copies of `state`, this half's part of an adapter at `cut`, less its frozen factors.

        Raises `AdapterError` as `require` does.
        """
        self.require(state, cut, rank)
        return {
            key: nn.Parameter(torch.tensor(state[key], dtype=torch.float32, device=self._current(key).device))
            for key in sorted(self.keys(cut))
        }

    def require(self, state: AdapterState, cut: int, rank: int = 0) -> None:
        """Raise `AdapterError`, naming the first tensor that is missing, unknown or of another shape, unless `state` is this
        half's part of an adapter at `cut`; its frozen factors are not looked at.

        A of shape (rank, in) and B (out, rank) may be of any `rank`, 0 for that of the LoRA settings; their product is scaled
        by the settings' alpha / rank all the same.
        """
        expected, given = self.keys(cut), {key for key in state if key.part not in (FROZEN_A, FROZEN_B)}
        for key in sorted(expected ^ given):
            problem = "missing from" if key in expected else "unknown to"
            raise AdapterError(f"adapter tensor {key} is {problem} the half at cut {cut}: are cut and LoRA targets the same?")
        for key in sorted(given):
            shape = self._shape(key, rank)
            if state[key].shape != shape:
                raise AdapterError(
                    f"adapter tensor {key} has shape {state[key].shape}, expected {shape}: is the LoRA rank the same?"
                )

    def frozen_for(self, state: AdapterState, cut: int) -> FrozenFactors:
        """The frozen factors in `state`, this half's part of an adapter at `cut`; in CPU memory they are its very arrays.

        Raises `AdapterError` as `FrozenSlots.take` does.
        """
        shapes = {key: self._shapes[key] for key in self.keys(cut)}
        return self._frozen.take(state, shapes, next(self._current(key).device for key in shapes))

    def mount(self, parameters: dict[AdapterKey, nn.Parameter], frozen: FrozenFactors | None = None) -> None:
        """Make the half compute with these parameters and frozen factors from now on; gradients arrive in the parameters."""
        for key, parameter in parameters.items():
            module, name = self.slots[key]
            module._parameters[name] = parameter
        self._frozen.mount(frozen or {})

    @staticmethod
    def read(parameters: dict[AdapterKey, nn.Parameter]) -> AdapterState:
        """Copies of the values, as fp32 arrays."""
        return {key: parameter.detach().float().cpu().numpy().copy() for key, parameter in parameters.items()}

    def _shape(self, key: AdapterKey, rank: int) -> tuple[int, ...]:
        shape = self._shapes[key]
        if not rank or key.layer == HEAD:
            return shape
        return (rank, shape[1]) if key.part == "A" else (shape[0], rank)

    def _current(self, key: AdapterKey) -> Tensor:
        module, name = self.slots[key]
        return module.get_parameter(name)


def head_state(half: EdgeHalf) -> AdapterState:
    """Copies of the task head's values in fp32; call it before any adapter is mounted. Empty for a causal LM."""
    return {key: module.get_parameter(key.part).detach().float().cpu().numpy().copy() for key, module in _head_tensors(half.head)}


def _head_tensors(head: dict[str, nn.Module]) -> Iterator[tuple[AdapterKey, nn.Module]]:
    for root, module in head.items():
        for name, child in module.named_modules(prefix=root):
            for part, _ in child.named_parameters(recurse=False):
                yield AdapterKey(HEAD, name, part), child


def initial_adapter(config: PretrainedConfig, task: Task, lora: LoraSpec, head: AdapterState, seed: int) -> AdapterState:
    """Version 0: the adapter of all layers, the same whatever the cut, so that training starts from the base model.

    A (rank, in) is drawn as peft draws it, uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), from a generator seeded
    by `seed` and the tensor's name; B (out, rank) is zero; `head` (`head_state` of the edge's half) is taken as it is.
    `lora` must be resolved. Raises `AdapterError` where a classifier comes without a head, or a causal LM with one.
    """
    family = family_of(config)
    require_task(family, task)
    if bool(head) != (task == "classification"):
        raise AdapterError(f"an adapter for '{task}' starts {'without' if head else 'with'} a task head's values")
    model = build_skeleton(config, task)
    state: AdapterState = {}
    for index, block in enumerate(model.get_submodule(family.blocks).children()):
        _inject(block, lora)
        for name, layer in _lora_layers(block):
            a, b = AdapterKey(index, name, "A"), AdapterKey(index, name, "B")
            state[a] = _kaiming(layer.lora_A[_ADAPTER].get_parameter("weight").shape, f"{seed}/{a}").numpy()
            state[b] = torch.zeros(layer.lora_B[_ADAPTER].get_parameter("weight").shape).numpy()
    return state | head


def _kaiming(shape: torch.Size, name: str) -> Tensor:
    digest = hashlib.sha256(name.encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
