"""Filling a skeleton: each tensor that it still has is taken from the checkpoint by name, and nothing else is opened."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sfl.allocator import release_freed_memory
from sfl.errors import ModelError
from sfl.model.checkpoint import Checkpoint, StoredTensor
from sfl.model.families import family_of
from sfl.model.frozen import FrozenLinear
from sfl.model.table import keep_stored

# What a tensor of the model may be called in a checkpoint that another version wrote.
_OTHER_NAMES = (
    (re.compile(r"LayerNorm\.weight$"), "LayerNorm.gamma"),
    (re.compile(r"LayerNorm\.bias$"), "LayerNorm.beta"),
    (re.compile(r"^lm_head\."), "embed_out."),  # GPT-NeoX
)


def fill(model: PreTrainedModel, checkpoint: Checkpoint, seed: int, stored_tables: bool = False) -> None:
    """Give a skeleton its weights, on the CPU: those in its own dtype stay mapped, others are converted one by one.

    A classifier's head that the checkpoint lacks, or has for another number of classes, is initialised under `seed`; the
    global generator is left as it was. With `stored_tables` the embeddings' tables stay in their file.
    Raises `ModelError` when other weights are missing or of another shape.
    """
    places, absent = locate(model, checkpoint)
    tables: list[Place] = []
    for place in places:
        module, stored = place.module, place.stored
        if isinstance(module, FrozenLinear) and place.part == "weight":
            module.take(stored, checkpoint.get(f"{stored.name}.scale"))
            _mark(module.weight, True)
        elif stored_tables and isinstance(module, nn.Embedding):
            tables.append(place)
            _put(module, place.part, stored.mapped())
        else:
            _put(module, place.part, stored.mapped() if stored.dtype == place.dtype else stored.read(place.dtype))
    model.tie_weights(missing_keys=absent, recompute_mapping=False)  # what is tied is absent no more
    require(model, checkpoint, absent)
    _initialise(model, absent, seed)
    for place in tables:
        keep_stored(place.module, place.stored, place.dtype)
    release_freed_memory(0)  # holes that conversions have left


class Place(NamedTuple):
    """A tensor of the skeleton: its name, its module and name in it, its dtype, and where the checkpoint has it."""

    name: str
    module: nn.Module
    part: str
    dtype: torch.dtype
    stored: StoredTensor


def locate(model: PreTrainedModel, checkpoint: Checkpoint) -> tuple[list[Place], set[str]]:
    """All that the skeleton needs, and the names of what the checkpoint has not, or has in another shape."""
    places, absent = [], set()
    for name, module, part, expected in _needed(model):
        stored = find(model, checkpoint, name)
        if stored is None or stored.shape != _stored_shape(module, part, expected, stored):
            absent.add(name)
        else:
            places.append(Place(name, module, part, expected.dtype, stored))
    return places, absent


def find(model: PreTrainedModel, checkpoint: Checkpoint, name: str) -> StoredTensor | None:
    """The tensor that the model calls `name`: under that name or an older one, with or without the backbone's prefix."""
    prefix = f"{model.base_model_prefix}."
    for known in (name, *(pattern.sub(other, name) for pattern, other in _OTHER_NAMES)):
        for candidate in (known, known.removeprefix(prefix), prefix + known):
            stored = checkpoint.get(candidate)
            if stored is not None:
                return stored
    return None


def _needed(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Name, module, name in the module and meta tensor of all that a checkpoint has to give."""
    for path, module in list(model.named_modules()):
        tensors = dict(module.named_parameters(recurse=False))
        transient = module._non_persistent_buffers_set  # torch has no other name for those that are not saved
        tensors |= {part: buffer for part, buffer in module.named_buffers(recurse=False) if part not in transient}
        for part, tensor in tensors.items():
            yield f"{path}.{part}" if path else part, module, part, tensor


def _stored_shape(module: nn.Module, part: str, expected: Tensor, stored: StoredTensor) -> tuple[int, ...]:
    if isinstance(module, FrozenLinear) and part == "weight":
        return module.stored_shape(stored)
    return tuple(expected.shape)


def _put(module: nn.Module, part: str, value: Tensor, final: bool = True) -> None:
    """Set a parameter or buffer; one that is not `final` is for transformers to initialise."""
    before = module._parameters.get(part)
    if before is not None:
        value = nn.Parameter(value, requires_grad=before.requires_grad)
        module._parameters[part] = value
    else:
        module._buffers[part] = value
    _mark(value, final)


def _mark(tensor: Tensor, final: bool) -> None:
    tensor._is_hf_initialized = final  # type: ignore[attr-defined]  # what transformers goes by


def require(model: PreTrainedModel, checkpoint: Checkpoint, absent: set[str]) -> None:
    """Raise `ModelError` when what is absent is more than a classifier's head."""
    head = tuple(f"{module}." for module in family_of(model.config).head)
    missing = sorted(name for name in absent if not name.startswith(head))
    if missing:
        raise ModelError(
            f"the checkpoint '{checkpoint.name_or_dir}' lacks {len(missing)} weights of the model or has them in another shape,"
            f" the first being {missing[0]}: it belongs to another model or task"
        )


def _initialise(model: PreTrainedModel, absent: set[str], seed: int) -> None:
    """Values for a missing head, and for the buffers that no checkpoint holds, as transformers itself makes them."""
    for module in list(model.modules()):
        for part, buffer in list(module.named_buffers(recurse=False)):
            if buffer.is_meta:
                _put(module, part, torch.empty_like(buffer, device="cpu"), final=False)
    for name in absent:
        path, _, part = name.rpartition(".")
        _put(model.get_submodule(path), part, torch.empty_like(model.get_parameter(name), device="cpu"), final=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.initialize_weights()  # type: ignore[no-untyped-call]
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise ModelError(f"a model of type '{model.config.model_type}' has a part that sfl cannot load: {left[0]}")
