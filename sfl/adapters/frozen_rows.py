"""Frozen factors on disk: more rows of A and columns of B, so that what loads LoRA factors loads them too."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState, Array
from sfl.errors import AdapterError

Frozen = dict[tuple[int, str], int]  # number of frozen factors of each module that has some, by layer and module


def counts(state: Mapping[AdapterKey, Array]) -> Frozen:
    """How many frozen factors each module has; those without any are left out."""
    return {(key.layer, key.module): len(state[key]) for key in sorted(state) if key.part == FROZEN_A}


def joined(key: AdapterKey, value: Array, state: Mapping[AdapterKey, Array], rank: int) -> Array:
    """A trained factor with the frozen ones behind it, filled up to `rank`; the head's tensors as they are."""
    if key.layer == HEAD:
        return value
    axis = rank_axis(key.part)
    frozen = state.get(key._replace(part=FROZEN_A if key.part == "A" else FROZEN_B))
    parts = [value] if frozen is None else [value, frozen]
    missing = rank - sum(part.shape[axis] for part in parts)
    if missing:
        parts.append(np.zeros((missing, value.shape[1]) if axis == 0 else (value.shape[0], missing), np.float32))
    return value if len(parts) == 1 else np.concatenate(parts, axis)


def parted(key: AdapterKey, value: Array, rank: int, frozen: Frozen) -> AdapterState:
    """The inverse of `joined` for one tensor. Raises `AdapterError` when there are fewer factors than there should be."""
    count = None if key.layer == HEAD else frozen.get((key.layer, key.module))
    if key.layer == HEAD or not frozen:
        return {key: value}
    axis = rank_axis(key.part)
    if value.ndim != 2 or not 0 <= (count or 0) <= value.shape[axis] - rank:
        raise AdapterError(f"adapter tensor {key} has shape {value.shape}, which does not hold {rank} + {count or 0} factors")
    trained, behind, _ = np.split(value, [rank, rank + (count or 0)], axis)
    parts = {key: np.ascontiguousarray(trained)}
    if count is not None:
        parts[key._replace(part=FROZEN_A if key.part == "A" else FROZEN_B)] = np.ascontiguousarray(behind)
    return parts


def rank_axis(part: str) -> int:
    return 0 if part in ("A", FROZEN_A) else 1
