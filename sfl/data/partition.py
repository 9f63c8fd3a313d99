"""One file divided among several devices, each of which finds its own part alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sfl.data.example import Example
from sfl.data.settings import Partition
from sfl.errors import DataError, TooFewExamplesError

_DRAWS = 1000


def take_part(examples: Sequence[Example], index: int, count: int, scheme: Partition, alpha: float, seed: int) -> list[Example]:
    """Part `index` of `count`, in file order. The parts are disjoint and together are all the examples.

    `iid`: sizes differ by at most one. `label-skew`: of each class a device gets a share drawn from Dirichlet(`alpha`, ...)
    (Hsu et al. 2019), drawn anew until the smallest part has a fair size (10 examples, or half an even share if that is less).
    The same arguments give the same parts on every device. Raises `DataError` when there are too few examples.
    """
    if not 0 <= index < count:
        raise DataError(f"there is no part {index} of {count}: parts count from 0")
    if len(examples) < count:
        raise TooFewExamplesError(
            f"{len(examples)} examples cannot be divided among {count} devices: bring more, or fewer devices"
        )
    if count == 1:
        return list(examples)
    rng = np.random.default_rng(seed)
    owners = _even_owners(len(examples), count, rng) if scheme == "iid" else _skewed_owners(examples, count, alpha, rng)
    return [example for example, owner in zip(examples, owners.tolist(), strict=True) if owner == index]


def _even_owners(total: int, count: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return rng.permutation(np.arange(total, dtype=np.int64) % count)


def _skewed_owners(
    examples: Sequence[Example], count: int, alpha: float, rng: np.random.Generator
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    labels = np.array([example.label or "" for example in examples])
    smallest = max(1, min(10, len(examples) // (2 * count)))
    owners = np.zeros(len(examples), dtype=np.int64)
    for _ in range(_DRAWS):
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            ends = np.rint(np.cumsum(rng.dirichlet(np.full(count, alpha))) * len(members)).astype(np.int64)
            owners[members] = np.searchsorted(ends[:-1], np.arange(len(members)), side="right")
        if np.bincount(owners, minlength=count).min() >= smallest:
            return owners
    raise TooFewExamplesError(
        f"no division of {len(examples)} examples among {count} devices with alpha {alpha:g} gives each at least {smallest}: "
        "raise partition_alpha, or divide evenly (iid)"
    )
