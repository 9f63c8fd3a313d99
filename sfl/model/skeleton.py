"""A task model without weights: its modules are made, and no memory is taken and no number drawn for them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights

from sfl.data.settings import Task


def build_skeleton(config: PretrainedConfig, task: Task, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model for `task`, its weights in `dtype` on the meta device, its computed tables on the CPU, with a copy of `config`.

    Tied weights are not tied yet.
    """
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if task == "classification" else MODEL_FOR_CAUSAL_LM_MAPPING
    model_class: Any = mapping[type(config)]
    config = copy.deepcopy(config)
    config.dtype = dtype
    with _WeightsOnMeta(), _default_dtype(dtype), no_init_weights():  # type: ignore[no-untyped-call]
        model: PreTrainedModel = model_class(config)
    return model


class _WeightsOnMeta(TorchFunctionMode):
    """New tensors of floats take no memory. Tables of positions, masks and rotations are computed as ever.

    Computing on the meta device would import torch's symbols, 40 MB or more.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        floats = options.get("dtype") in (None, torch.float32, torch.bfloat16)
        if function in (torch.empty, torch.zeros, torch.ones) and options.get("device") is None and floats:
            options["device"] = "meta"
        return function(*args, **options)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
