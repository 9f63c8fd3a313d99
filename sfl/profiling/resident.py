"""How many bytes of some tensors are in memory: of a memory-mapped one, only the pages that were touched."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from torch import Tensor

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_PRESENT, _OF_A_FILE = np.uint64(1 << 63), np.uint64(1 << 61)


class Resident(NamedTuple):
    """Bytes in memory, and how many of them are pages of a file that the kernel can drop and read again."""

    total: int
    of_files: int


def resident(tensors: Iterable[Tensor]) -> Resident | None:
    """Of the CPU tensors among these, each byte once; None where /proc/self/pagemap is not there to be read."""
    total, of_files = 0, 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:  # noqa: PTH123
            for start, stop in _merged(map(_span, filter(_has_bytes, tensors))):
                first, last = start // _PAGE, (stop - 1) // _PAGE
                raw = os.pread(pagemap.fileno(), 8 * (last - first + 1), 8 * first)
                entries = np.frombuffer(raw, dtype=np.uint64)
                lengths = np.full(len(entries), _PAGE)
                lengths[0] -= start - first * _PAGE
                lengths[-1] -= (last + 1) * _PAGE - stop
                present = entries & _PRESENT != 0
                total += int(lengths[present].sum())
                of_files += int(lengths[present & (entries & _OF_A_FILE != 0)].sum())
    except (OSError, IndexError):  # IndexError: nothing could be read of a range
        return None
    return Resident(total, of_files)


def _has_bytes(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() > 0


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address and the one after the last."""
    items = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + items * tensor.element_size()


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same addresses in spans that do not overlap."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged
