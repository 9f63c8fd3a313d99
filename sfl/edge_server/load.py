"""From an edge server's settings to its half of the base."""

from __future__ import annotations

from collections.abc import Sequence

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import AdapterState
from sfl.model.cut import EdgeHalf
from sfl.model.halves import load_edge_half
from sfl.model.lora import AdapterSlots, head_state, initial_adapter, inject_lora
from sfl.settings import EdgeSettings


def load_half(settings: EdgeSettings, lora: LoraSpec, labels: Sequence[str]) -> tuple[EdgeHalf, AdapterSlots, AdapterState]:
    """The edge's half, where its adapters go, and version 0 as this edge would begin. `lora` must be resolved.

    Raises `ModelError` as `load_edge_half` does.
    """
    half = load_edge_half(
        settings.model,
        settings.task,
        settings.lowest_cut,
        labels,
        settings.precision,
        settings.compute_format,
        settings.run_on,
        settings.seed,
    )
    initial = initial_adapter(half.config, settings.task, lora, head_state(half), settings.seed)
    return half, inject_lora(half, lora), initial
