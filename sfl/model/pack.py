"""A model folder with a device's half alone, in the precision in which it is kept: what an edge sends to a device."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sfl.errors import DamagedModelError
from sfl.model.checkpoint import DTYPES as STORED_DTYPES
from sfl.model.checkpoint import WEIGHTS, Checkpoint, StoredTensor, find_files
from sfl.model.cut import DeviceHalf, check_cut
from sfl.model.fingerprint import model_fingerprint
from sfl.model.load import load_config, load_task_config
from sfl.model.packed import PackedHalf, require_packed, write_packed
from sfl.model.precision import DTYPES, freeze_linears, require_runnable
from sfl.model.quantised import QuantisedLinear
from sfl.model.skeleton import build_skeleton
from sfl.model.source import COPIED, model_source
from sfl.model.weights import locate, require
from sfl.settings import Precision, compute_format

_SLAB = 1 << 20  # bytes that are read at a time
_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}


def pack_device_half(
    name_or_dir: str | Path,
    cut: int,
    precision: Precision,
    folder: Path,
    require_room: Callable[[int], None] = lambda size: None,
) -> None:
    """Write the device's half at `cut` to `folder`, which loads as any model folder does, for this cut and lower ones.

    It has the configuration of the whole model, the tokenizer's files and the half's tensors: quantised weights with their
    `.scale` beside them, other block weights in at most `precision`, the rest as stored. No more than a slab of a tensor is in
    memory. The same half gives the same bytes; `sfl.json` is written last. Before anything is written `require_room` is called
    with the bytes of all files but that one, and may raise.
    Raises `ModelError` as `load_device_half` does, and `OSError` where the folder cannot be written.
    """
    check_cut(load_config(name_or_dir), cut)
    require_packed(name_or_dir, cut, precision)
    require_runnable(precision, compute_format(precision), "cpu")
    config = load_task_config(name_or_dir, "classification", ("0", "1"))
    model = build_skeleton(config, "classification")
    half = DeviceHalf(model, cut)
    freeze_linears(half.own_blocks.values(), precision, compute_format(precision))
    weights = _WeightsFile(list(_entries(model, half, Checkpoint(name_or_dir), precision)))
    copied = find_files(name_or_dir, COPIED)
    require_room(weights.size + sum(path.stat().st_size for path in copied.values()))
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in copied.items():
        shutil.copyfile(path, folder / name)
    partial = folder / f"{WEIGHTS}.partial"
    with partial.open("wb") as stream:
        weights.write(stream)
    partial.replace(folder / WEIGHTS)
    fingerprint = model_fingerprint(name_or_dir)
    write_packed(folder, PackedHalf(fingerprint, model_source(folder, fingerprint), cut, precision))


@dataclass(frozen=True)
class _Entry:
    """A tensor to be written, in parts that are made one after the other."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Iterable[Tensor]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def _entries(model: PreTrainedModel, half: DeviceHalf, checkpoint: Checkpoint, precision: Precision) -> Iterator[_Entry]:
    """What the half holds, under the model's names; a scale comes after its weight, which has to be made first."""
    linears = [m for block in half.own_blocks.values() for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))]
    places, absent = locate(model, checkpoint)
    require(model, checkpoint, absent)
    for name, module, part, _, stored in places:
        if isinstance(module, QuantisedLinear) and part == "weight":
            yield from _quantised(name, module, stored, checkpoint)
            continue
        dtype = stored.dtype
        if part == "weight" and precision in DTYPES and any(module is linear for linear in linears):
            dtype = min(dtype, DTYPES[precision], key=lambda known: known.itemsize)  # the larger says no more
        yield _Entry(name, dtype, stored.shape, _rows(stored, dtype))


def _quantised(name: str, module: QuantisedLinear, stored: StoredTensor, checkpoint: Checkpoint) -> Iterator[_Entry]:
    before = checkpoint.get(f"{stored.name}.scale")
    if stored.dtype == module.kept and before is not None:  # packed once already
        yield _Entry(name, stored.dtype, stored.shape, _rows(stored, stored.dtype))
        yield _Entry(f"{name}.scale", before.dtype, before.shape, _rows(before, before.dtype))
        return
    scales: list[Tensor] = []

    def weights() -> Iterator[Tensor]:
        for rows, scale in module.quantised(stored):
            scales.append(scale)
            yield rows

    yield _Entry(name, module.kept, (module.out_features, module.kept_width()), weights())
    yield _Entry(f"{name}.scale", torch.float32, module.scale_shape(), scales)


def _rows(stored: StoredTensor, dtype: torch.dtype) -> Iterator[Tensor]:
    if not stored.shape:
        return iter((stored.read(dtype),))
    return (stored.rows(first, last).to(dtype) for first, last in stored.slabs(_SLAB))


class _WeightsFile:
    """A safetensors file to be: large items first, so that every tensor is aligned, then by name. `size` is in bytes."""

    def __init__(self, entries: list[_Entry]) -> None:
        self._entries = entries
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for entry in sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name)):
            self._starts[entry.name] = position
            offsets = [position, position + entry.size]
            header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
            position += entry.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text
        self.size = len(self._head) + position

    def write(self, stream: IO[bytes]) -> None:
        stream.write(self._head)
        for entry in self._entries:
            start = len(self._head) + self._starts[entry.name]
            stream.seek(start)
            for part in entry.parts:
                stream.write(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            if stream.tell() != start + entry.size:
                raise DamagedModelError(
                    f"tensor '{entry.name}' has not the size that its shape asks for: fetch the checkpoint again"
                )
