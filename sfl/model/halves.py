"""Each half straight from a checkpoint, reading no weight that it does not hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sfl.data.settings import Task
from sfl.model.cut import DeviceHalf, EdgeHalf, check_cut, drop_below, held_blocks
from sfl.model.load import load_config, load_task_config, load_weights
from sfl.model.packed import require_packed, require_whole
from sfl.model.precision import DTYPES, freeze_linears, require_runnable
from sfl.model.skeleton import build_skeleton
from sfl.settings import Compute, Precision, RunOn, compute_format


def load_device_half(
    name_or_dir: str | Path,
    cut: int,
    precision: Precision = "fp32",
    compute: Compute | None = None,
    run_on: RunOn = "cpu",
) -> DeviceHalf:
    """Embeddings and blocks 0 to `cut` - 1, for any task.

    The blocks' linear layers are kept in `precision`; activations, norms and biases are in `compute` (left out: fp32 for
    fp32, else bf16). The embeddings' tables stay in their file.
    Raises `ModelError` when the model cannot be found, read, cut there or run in this precision here.
    """
    compute = compute_format(precision, compute)
    check_cut(load_config(name_or_dir), cut)
    require_packed(name_or_dir, cut, precision)
    require_runnable(precision, compute, run_on)
    # As a classifier, whose small head is dropped again: so a causal LM's large one is not read.
    model = build_skeleton(load_task_config(name_or_dir, "classification", ("0", "1")), "classification", DTYPES[compute])
    half = DeviceHalf(model, cut)
    freeze_linears(half.own_blocks.values(), precision, compute)
    load_weights(model, name_or_dir, stored_tables=True)
    return half.eval().to(run_on)


def load_edge_half(
    name_or_dir: str | Path,
    task: Task,
    lowest_cut: int,
    labels: Sequence[str] = (),
    precision: Precision = "fp32",
    compute: Compute | None = None,
    run_on: RunOn = "cpu",
    seed: int = 0,
) -> EdgeHalf:
    """Blocks from `lowest_cut` on, embeddings and head; a missing head is initialised under `seed`, as in `load_task_model`.

    `precision` and `compute` are as in `load_device_half`. Raises `ModelError` as `load_task_model` and `EdgeHalf` do.
    """
    compute = compute_format(precision, compute)
    check_cut(load_config(name_or_dir), lowest_cut)
    require_whole(name_or_dir)
    require_runnable(precision, compute, run_on)
    model = build_skeleton(load_task_config(name_or_dir, task, labels), task, DTYPES[compute])
    drop_below(model, lowest_cut)
    freeze_linears(held_blocks(model, lowest_cut), precision, compute)
    load_weights(model, name_or_dir, seed)
    return EdgeHalf(model, lowest_cut, DTYPES[compute]).to(run_on)
