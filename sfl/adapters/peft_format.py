"""PEFT's file format, written and read without peft or torch.

A folder holds `adapter_model.safetensors` and `adapter_config.json`, as `PeftModel.from_pretrained` expects them for the
uncut model, and `sfl.json` with the `AdapterLayout` and `SHA256SUMS`, which PEFT leaves alone.

Frozen factors are written as more rows of A and columns of B: [A; frozen_A; 0] and [B, frozen_B, 0], filled up with zeros
to one rank r for all modules, with a lora_alpha that leaves alpha / r what it was. `sfl.json` says how many each module has.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import re
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sfl.adapters import checksums
from sfl.adapters.completeness import require_complete
from sfl.adapters.frozen_rows import Frozen, counts, joined, parted
from sfl.adapters.layout import AdapterLayout, LoraSpec
from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState, Array
from sfl.disk import make_folder, of_the_moment, replace_file, sync
from sfl.errors import AdapterError

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
LAYOUT = "sfl.json"

_FORMAT = 1  # of sfl.json
_ROOT = "base_model.model."  # PeftModel, then LoraModel, around the task model
_UNFINISHED = re.compile(r"\..+\.[0-9a-f]{32}")  # folders before their renaming, or after it when they are to go
_TASK_TYPES = {"classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM"}


class AdapterWriteError(AdapterError):
    """An adapter's folder cannot be written, because the disk is full, say: trying again may help."""

    number = 401
    lasting = False


class _About(NamedTuple):
    """What sfl.json says."""

    layout: AdapterLayout
    frozen: Frozen


def write(
    folder: Path, state: Mapping[AdapterKey, Array], layout: AdapterLayout, extras: Mapping[str, bytes] | None = None
) -> None:
    """Write a whole adapter to `folder`, which must not exist yet: it is there with all its files or not at all, even
    if the machine loses power. `extras` are more files, by name.

    Raises `AdapterError` when the adapter does not fit `layout`, `AdapterWriteError` when the folder cannot be written.
    """
    require_complete(state, layout)
    frozen = counts(state)
    rank = layout.lora.rank + max(frozen.values(), default=0)
    tensors = {
        _tensor_name(key, layout): np.ascontiguousarray(joined(key, value, state, rank), dtype=np.float32)
        for key, value in state.items()
        if key.part not in (FROZEN_A, FROZEN_B)
    }
    about: dict[str, Any] = {"format": _FORMAT, "layout": dataclasses.asdict(layout)}
    if frozen:
        about["frozen"] = {f"{layer}/{module}": count for (layer, module), count in frozen.items()}
    if folder.exists():
        raise AdapterWriteError(f"cannot write the adapter to {folder}: it exists already")
    unfinished = _unfinished_name(folder)
    try:
        make_folder(folder.parent)
        unfinished.mkdir()
        save_file(tensors, unfinished / TENSORS, metadata={"format": "pt"})
        _write_json(unfinished / CONFIG, _peft_config(layout, rank))
        _write_json(unfinished / LAYOUT, about)
        for name, content in (extras or {}).items():
            (unfinished / name).write_bytes(content)
        checksums.write(unfinished)
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        unfinished.rename(folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if folder.exists():  # it could not be made sure that it lasts
            folder.rename(unfinished)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise AdapterWriteError(f"cannot write the adapter to {folder}: {error}") from error


def remove(folder: Path) -> None:
    """Delete an adapter's folder: it is there with all its files or not at all. Raises `AdapterWriteError` when it cannot be."""
    leaving = _unfinished_name(folder)
    try:
        folder.rename(leaving)
        sync(folder.parent)  # before any file goes: with the power lost, it must not come back without some
        shutil.rmtree(leaving)
    except OSError as error:
        raise AdapterWriteError(f"cannot delete {folder}: {error}") from error


def add_file(folder: Path, name: str, content: bytes) -> None:
    """Put one more file into an adapter's folder, whole or not at all. Raises `AdapterWriteError` when it cannot be written."""
    try:
        replace_file(folder / name, content)
    except OSError as error:
        raise AdapterWriteError(f"cannot write {folder / name}: {error}") from error


def sweep(parent: Path) -> None:
    """Delete what was left half written or half deleted in `parent` when its process was killed."""
    for path in parent.glob(".*"):
        if _UNFINISHED.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def read(folder: Path) -> tuple[AdapterState, AdapterLayout]:
    """The adapter in `folder`, all tensors float32, and its layout.

    Raises `AdapterError` when the folder is missing, was not written by sfl, or holds an adapter that is damaged, incomplete or
    not to be read, `OSError` when that is so for the moment, as too many files are open, say.
    """
    layout, frozen = _read_about(folder)
    try:
        with (folder / TENSORS).open("rb"):  # safetensors says of any file that it cannot open that it is not there
            tensors = load_file(folder / TENSORS)
    except FileNotFoundError as error:
        if (folder / TENSORS).exists():  # this one was the last that may be open
            raise OSError(errno.EMFILE, f"{folder / TENSORS} cannot be opened") from error
        raise AdapterError(f"{folder} holds no {TENSORS}: the adapter is incomplete") from error
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        if isinstance(error, OSError) and of_the_moment(error):
            raise
        raise AdapterError(f"{folder / TENSORS} is damaged: {error}") from error
    state: AdapterState = {}
    for name, value in tensors.items():
        key = _adapter_key(name, layout)
        state |= parted(key, value.astype(np.float32, copy=False), layout.lora.rank, frozen)
    require_complete(state, layout)
    for key, value in state.items():
        if not np.isfinite(value).all():
            raise AdapterError(f"adapter tensor {key} in {folder} holds values that are not finite")
    return state, layout


def read_layout(folder: Path) -> AdapterLayout:
    """The layout of the adapter in `folder`, without its tensors.

    Raises `AdapterError` when the folder is missing, was not written by sfl or is not to be read, `OSError` when that is so for
    the moment.
    """
    return _read_about(folder).layout


def _unfinished_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _read_about(folder: Path) -> _About:
    path = folder / LAYOUT
    if not folder.is_dir():
        raise AdapterError(f"there is no adapter folder {folder}")
    if not path.is_file():
        inside = max(folder.glob(f"v*/{LAYOUT}"), key=lambda each: (len(each.parent.name), each), default=None)
        if inside is not None:
            raise AdapterError(f"{folder} holds versions of an adapter: give one of them, such as {inside.parent}")
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
        frozen: Frozen = {}
        for name, count in document.get("frozen", {}).items():
            layer, _, module = name.partition("/")
            frozen[int(layer), module] = int(count)
        return _About(AdapterLayout(lora=LoraSpec(**lora), **fields), frozen)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and of_the_moment(error):
            raise
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


def _peft_config(layout: AdapterLayout, rank: int) -> dict[str, Any]:
    """What peft.LoraConfig saves, for files of this rank; peft itself turns `fan_in_fan_out` on for GPT-2's transposed layers."""
    if layout.task not in _TASK_TYPES:
        raise AdapterError(f"task '{layout.task}' is unknown: PEFT's format is written for {', '.join(_TASK_TYPES)}")
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES[layout.task],
        "base_model_name_or_path": layout.base_model,
        "r": rank,
        "lora_alpha": layout.lora.alpha if rank == layout.lora.rank else layout.lora.alpha / layout.lora.rank * rank,
        "lora_dropout": layout.lora.dropout,
        "target_modules": list(layout.lora.target_modules),
        "modules_to_save": list(layout.head) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
