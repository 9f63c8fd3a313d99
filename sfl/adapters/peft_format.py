"""PEFT's file format, written and read without peft or torch.

A folder holds `adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.from_pretrained` expects them for the
uncut model, and `sfl.json` with the `AdapterLayout`, which PEFT leaves alone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sfl.adapters.layout import AdapterLayout, LoraSpec
from sfl.adapters.state import HEAD, AdapterKey, AdapterState, Array
from sfl.errors import AdapterError

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LAYOUT = "sfl.json"

_FORMAT = 1  # of sfl.json
_ROOT = "base_model.model."  # PeftModel, then LoraModel, around the task model
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")  # folders before their renaming
_TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


class AdapterWriteError(AdapterError):
    """An adapter's folder cannot be written, because the disk is full, say: trying again may help."""


def write(folder: Path, state: Mapping[AdapterKey, Array], layout: AdapterLayout) -> None:
    """Write a whole adapter to `folder`, which must not exist yet: it is there with all its files or not at all, even
    if the machine loses power.

    Raises `AdapterError` when the adapter does not fit `layout`, `AdapterWriteError` when the folder cannot be written.
    """
    _require_complete(state, layout)
    tensors = {_tensor_name(key, layout): np.ascontiguousarray(value, dtype=np.float32) for key, value in state.items()}
    if folder.exists():
        raise AdapterWriteError(f"cannot write the adapter to {folder}: it exists already")
    unfinished = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        unfinished.mkdir(parents=True)
        save_file(tensors, unfinished / TENSORS, metadata={"format": "pt"})
        _write_json(unfinished / CONFIG, _peft_config(layout))
        _write_json(unfinished / LAYOUT, {"format": _FORMAT, "layout": dataclasses.asdict(layout)})
        for path in (*unfinished.iterdir(), unfinished):
            _sync(path)
        unfinished.rename(folder)
        _sync(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise AdapterWriteError(f"cannot write the adapter to {folder}: {error}") from error


def sweep(parent: Path) -> None:
    """Delete what writers left unfinished in `parent` when their process was killed."""
    for path in parent.glob(".*"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def read(folder: Path) -> tuple[AdapterState, AdapterLayout]:
    """The adapter in `folder`, all tensors float32, and its layout.

    Raises `AdapterError` when the folder is missing, was not written by sfl, or holds a damaged or incomplete adapter.
    """
    layout = read_layout(folder)
    try:
        tensors = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        raise AdapterError(f"{folder} holds no {TENSORS}: the adapter is incomplete") from error
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise AdapterError(f"{folder / TENSORS} is damaged: {error}") from error
    state = {_adapter_key(name, layout): value.astype(np.float32, copy=False) for name, value in tensors.items()}
    _require_complete(state, layout)
    for key, value in state.items():
        if not np.isfinite(value).all():
            raise AdapterError(f"adapter tensor {key} in {folder} holds values that are not finite")
    return state, layout


def read_layout(folder: Path) -> AdapterLayout:
    """The layout of the adapter in `folder`, without its tensors.

    Raises `AdapterError` when the folder is missing or was not written by sfl.
    """
    path = folder / LAYOUT
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}")
    if not path.is_file():
        raise AdapterError(f"{folder} holds no {LAYOUT}: it was not written by sfl, which needs it to know labels and layers")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != _FORMAT:
            raise AdapterError(f"{path} has format {document['format']}, this version of sfl reads {_FORMAT}")
        fields: dict[str, Any] = dict(document["layout"])
        lora = dict(fields.pop("lora"))
        lora["target_modules"] = tuple(lora["target_modules"])
        for name in ("head", "labels", "columns"):
            fields[name] = tuple(fields[name])
        return AdapterLayout(lora=LoraSpec(**lora), **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AdapterError(f"{path} is damaged: {error!r}") from error


def _tensor_name(key: AdapterKey, layout: AdapterLayout) -> str:
    if key.layer == HEAD:
        return f"{_ROOT}{key.module}.{key.part}"
    return f"{_ROOT}{layout.blocks}.{key.layer}.{key.module}.lora_{key.part}.weight"


def _adapter_key(name: str, layout: AdapterLayout) -> AdapterKey:
    path, blocks = name.removeprefix(_ROOT), f"{layout.blocks}."
    if not path.startswith(blocks):
        module, _, part = path.rpartition(".")
        return AdapterKey(HEAD, module, part)
    layer, _, rest = path.removeprefix(blocks).partition(".")
    for part in ("A", "B"):
        if layer.isdecimal() and rest.endswith(f".lora_{part}.weight"):
            return AdapterKey(int(layer), rest.removesuffix(f".lora_{part}.weight"), part)
    raise AdapterError(f"'{name}' is no LoRA tensor of a block in {layout.blocks}")


def _require_complete(state: Mapping[AdapterKey, Array], layout: AdapterLayout) -> None:
    """Raise `AdapterError` unless every block has the same A and B at the layout's rank and the head is what it says."""
    modules = sorted({(key.module, key.part) for key in state if key.layer != HEAD})
    if not modules:
        raise AdapterError("the adapter has no LoRA tensors at all")
    expected = {AdapterKey(layer, module, part) for layer in range(layout.num_layers) for module, part in modules}
    expected |= {AdapterKey(layer, module, part) for layer, module, _ in expected for part in ("A", "B")}
    actual = {key for key in state if key.layer != HEAD}
    for key in sorted(expected ^ actual):
        problem = "missing from" if key in expected else f"outside the {layout.num_layers} layers of"
        raise AdapterError(f"adapter tensor {key} is {problem} the adapter")
    rank = layout.lora.rank
    for key in sorted(actual):
        shape = state[key].shape
        if len(shape) != 2 or shape[0 if key.part == "A" else 1] != rank:
            raise AdapterError(f"adapter tensor {key} has shape {shape}, which does not go with LoRA rank {rank}")
    head = sorted({key.module for key in state if key.layer == HEAD})
    for path in layout.head:
        if not any(_inside(module, path) for module in head):
            raise AdapterError(f"the adapter lacks the task head '{path}'")
    for module in head:
        if not any(_inside(module, path) for path in layout.head):
            raise AdapterError(f"'{module}' is no part of the task head, which is {', '.join(layout.head) or 'none'}")


def _inside(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _peft_config(layout: AdapterLayout) -> dict[str, Any]:
    """What peft.LoraConfig saves; peft itself turns `fan_in_fan_out` on for GPT-2's transposed layers."""
    if layout.task not in _TASK_TYPES:
        raise AdapterError(f"task '{layout.task}' is unknown: PEFT's format is written for {', '.join(_TASK_TYPES)}")
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[layout.task],
        "base_model_name_or_path": layout.base_model,
        "r": layout.lora.rank,
        "lora_alpha": layout.lora.alpha,
        "lora_dropout": layout.lora.dropout,
        "target_modules": list(layout.lora.target_modules),
        "modules_to_save": list(layout.head) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files are in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
