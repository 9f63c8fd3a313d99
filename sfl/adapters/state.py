"""The adapter as layer-indexed data, the same keys whatever the cut."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sfl.errors import AdapterError

HEAD = 1 << 20  # sorts after every block, so the head belongs to the edge's half at any cut
FROZEN_A, FROZEN_B = "frozen_A", "frozen_B"

Array = npt.NDArray[np.float32]


class AdapterKey(NamedTuple):
    """Names one tensor: block index, module inside the block, and which of its tensors.

    For LoRA `part` is "A" (shape rank x in) or "B" (shape out x rank) and `module` is relative to the block, as in
    `AdapterKey(3, "self_attn.q_proj", "A")`. "frozen_A" (F x in) and "frozen_B" (out x F) are there where a merge has made
    them: devices apply them and do not train them. The task head has `layer == HEAD`, `module` relative to the model and
    `part` the parameter's name, as in `AdapterKey(HEAD, "classifier", "weight")`.
    """

    layer: int
    module: str
    part: str

    def __str__(self) -> str:
        """`3/self_attn.q_proj/A` or `head/classifier/weight`: the name on the wire and on disk."""
        return f"{'head' if self.layer == HEAD else self.layer}/{self.module}/{self.part}"

    @classmethod
    def parse(cls, text: str) -> AdapterKey:
        """The inverse of `str`. Raises `AdapterError` for anything else."""
        layer, *rest = text.split("/")
        if len(rest) != 2 or not all(rest) or not (layer == "head" or layer.isdecimal()):
            raise AdapterError(f"'{text}' is no adapter key: expected LAYER/MODULE/PART, as in 3/self_attn.q_proj/A")
        return cls(HEAD if layer == "head" else int(layer), rest[0], rest[1])


AdapterState = dict[AdapterKey, Array]


def device_half(state: Mapping[AdapterKey, Array], cut: int) -> AdapterState:
    """The part of an adapter that belongs to blocks 0 to `cut` - 1."""
    return {key: value for key, value in state.items() if key.layer < cut}


def edge_half(state: Mapping[AdapterKey, Array], cut: int) -> AdapterState:
    """The part of an adapter that belongs to blocks `cut` and up, with the task head."""
    return {key: value for key, value in state.items() if key.layer >= cut}


def trained_part(key: AdapterKey, rank: int) -> tuple[slice, ...]:
    """Where the factor of a smaller rank lies in that of a larger one: rows of A, columns of B, and all of anything else."""
    if key.layer != HEAD and key.part == "A":
        return (slice(rank),)
    if key.layer != HEAD and key.part == "B":
        return (slice(None), slice(rank))
    return ()


def difference(new: Mapping[AdapterKey, Array], old: Mapping[AdapterKey, Array]) -> AdapterState:
    """`new - old`, tensor by tensor. Raises `AdapterError` when keys or shapes differ."""
    require_same_keys(new, old)
    return {key: new[key] - old[key] for key in new}


def total(left: Mapping[AdapterKey, Array], right: Mapping[AdapterKey, Array]) -> AdapterState:
    """`left + right`, tensor by tensor. Raises `AdapterError` when keys or shapes differ."""
    require_same_keys(left, right)
    return {key: left[key] + right[key] for key in left}


def scaled(state: Mapping[AdapterKey, Array], factor: float) -> AdapterState:
    """`factor * state`, tensor by tensor, float32."""
    return {key: np.float32(factor) * value for key, value in state.items()}


def norm(state: Mapping[AdapterKey, Array]) -> float:
    """||state||_2 over all tensors together, in float64."""
    return math.sqrt(sum(float(np.sum(np.square(value, dtype=np.float64))) for value in state.values()))


def require_same_keys(left: Mapping[AdapterKey, Array], right: Mapping[AdapterKey, Array]) -> None:
    """Raise `AdapterError`, naming the first tensor that is missing, unknown or of another shape in `left`."""
    for key in sorted(left.keys() ^ right.keys()):
        raise AdapterError(f"adapter tensor {key} is {'unknown' if key in left else 'missing'}: are the LoRA targets the same?")
    for key in left:
        if left[key].shape != right[key].shape:
            raise AdapterError(f"adapter tensor {key} has shape {left[key].shape}, expected {right[key].shape}")


def byte_size(state: Mapping[AdapterKey, Array]) -> int:
    """Size of all tensors in bytes."""
    return sum(value.nbytes for value in state.values())
