"""Updates beside each other, a piece of a tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sfl.adapters.state import AdapterKey, Array, trained_part
from sfl.errors import UpdateError
from sfl.fed_server.updates import Update

_VALUES = 4_000_000  # in one piece, 16 MB


def rows(updates: Sequence[Update]) -> Iterator[tuple[AdapterKey, tuple[int, ...], slice, Array]]:
    """Each tensor's key and shape, and piece by piece where in the flat tensor a piece lies and the updates' values there.

    The values are (number of updates x length of the piece), in the order of `updates`. Shapes are those at the largest
    rank among the updates, smaller ones are padded with zeros. In memory are one piece, and one tensor of one update.
    Raises `UpdateError` for an update that cannot be read or has other tensors than the others.
    """
    largest = max(updates, key=lambda update: update.rank)
    shapes = {key: value.shape for key, value in largest.delta().items()}
    for key in sorted(shapes):
        size = int(np.prod(shapes[key]))
        length = max(1, _VALUES // len(updates))
        for start in range(0, size, length):
            piece = slice(start, min(start + length, size))
            values = np.empty((len(updates), piece.stop - piece.start), np.float32)
            for row, update in zip(values, updates):
                row[:] = _padded(update, key, shapes[key]).reshape(-1)[piece]
            yield key, shapes[key], piece, values


def _padded(update: Update, key: AdapterKey, shape: tuple[int, ...]) -> Array:
    delta = update.delta([key])
    if key not in delta:
        raise UpdateError(update.device, f"the update of device '{update.device}' lacks the tensor {key} that others have")
    if delta[key].shape == shape:
        return delta[key]
    padded = np.zeros(shape, np.float32)
    part = padded[trained_part(key, update.rank)]
    if part.shape != delta[key].shape:
        found = f"has shape {delta[key].shape} in the update of device '{update.device}'"
        raise UpdateError(update.device, f"adapter tensor {key} {found}, expected {part.shape}")
    part[...] = delta[key]
    return padded
