"""Each half straight from a checkpoint, reading no weight that it does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfl.data.settings import Task
from sfl.model.cut import DeviceHalf, EdgeHalf, check_cut, drop_above, drop_below
from sfl.model.load import load_config, load_task_model
from sfl.settings import Precision


def load_device_half(name_or_dir: str | Path, cut: int, dtype: Precision = "fp32") -> DeviceHalf:
    """Embeddings and blocks 0 to `cut` - 1, for any task. Raises `ModelError` as `load_task_model` and `DeviceHalf` do."""
    config = load_config(name_or_dir)
    check_cut(config, cut)
    # As a classifier, whose small head is dropped again: so a causal LM's large one is not read.
    unused = ("0", "1")
    model = load_task_model(name_or_dir, "classification", unused, dtype, drop=lambda model: drop_above(model, cut))
    return DeviceHalf(model, cut)


def load_edge_half(
    name_or_dir: str | Path,
    task: Task,
    lowest_cut: int,
    labels: Sequence[str] = (),
    dtype: Precision = "fp32",
    seed: int = 0,
) -> EdgeHalf:
    """Blocks from `lowest_cut` on, embeddings and head; a missing head is initialised under `seed`, as in `load_task_model`.

    Raises `ModelError` as `load_task_model` and `EdgeHalf` do.
    """
    config = load_config(name_or_dir)
    check_cut(config, lowest_cut)
    model = load_task_model(name_or_dir, task, labels, dtype, seed, drop=lambda model: drop_below(model, lowest_cut))
    return EdgeHalf(model, lowest_cut)
