"""Whether an adapter is whole and goes with its layout."""

from __future__ import annotations

from collections.abc import Mapping

from sfl.adapters.frozen_rows import rank_axis
from sfl.adapters.layout import AdapterLayout
from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, Array
from sfl.errors import AdapterError


def require_complete(state: Mapping[AdapterKey, Array], layout: AdapterLayout) -> None:
    """Raise `AdapterError` unless every block has the same A and B at the layout's rank, frozen factors come in pairs that go
    with them, and the head is what it says."""
    blocks = {key for key in state if key.layer != HEAD}
    actual = {key for key in blocks if key.part not in (FROZEN_A, FROZEN_B)}
    modules = sorted({(key.module, key.part) for key in actual})
    if not modules:
        raise AdapterError("the adapter has no LoRA tensors at all")
    expected = {AdapterKey(layer, module, part) for layer in range(layout.num_layers) for module, part in modules}
    expected |= {AdapterKey(layer, module, part) for layer, module, _ in expected for part in ("A", "B")}
    for key in sorted(expected ^ actual):
        problem = "missing from" if key in expected else f"outside the {layout.num_layers} layers of"
        raise AdapterError(f"adapter tensor {key} is {problem} the adapter")
    rank = layout.lora.rank
    for key in sorted(actual):
        shape = state[key].shape
        if len(shape) != 2 or shape[rank_axis(key.part)] != rank:
            raise AdapterError(f"adapter tensor {key} has shape {shape}, which does not go with LoRA rank {rank}")
    for key in sorted(blocks - actual):
        _require_frozen_pair(state, key)
    head = sorted({key.module for key in state if key.layer == HEAD})
    for path in layout.head:
        if not any(_inside(module, path) for module in head):
            raise AdapterError(f"the adapter lacks the task head '{path}'")
    for module in head:
        if not any(_inside(module, path) for path in layout.head):
            raise AdapterError(f"'{module}' is no part of the task head, which is {', '.join(layout.head) or 'none'}")


def _require_frozen_pair(state: Mapping[AdapterKey, Array], key: AdapterKey) -> None:
    """Raise `AdapterError` unless the other frozen factor is there and both go with the trained ones."""
    a, b, frozen_a, frozen_b = (key._replace(part=part) for part in ("A", "B", FROZEN_A, FROZEN_B))
    for there in (a, b, frozen_a, frozen_b):
        if there not in state:
            raise AdapterError(f"adapter tensor {there} is missing from the adapter, which has {key}")
    shapes = state[frozen_a].shape, state[frozen_b].shape
    count = shapes[0][:1]
    if shapes != ((*count, state[a].shape[1]), (state[b].shape[0], *count)):
        raise AdapterError(
            f"adapter tensors {frozen_a} and {frozen_b} have shapes {shapes[0]} and {shapes[1]}, which do not go together or with"
            f" {a} and {b}, {state[a].shape} and {state[b].shape}"
        )


def _inside(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")
