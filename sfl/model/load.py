"""Configurations, task models and tokenizers, from a directory or the Hugging Face hub; never from pickled weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import logging as hub_logging
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from sfl.data.settings import Task
from sfl.errors import ModelError, ModelNotFoundError, UnsupportedModelError
from sfl.model.checkpoint import Checkpoint, is_directory, require_safetensors
from sfl.model.families import FAMILIES, family_of, require_task
from sfl.model.packed import require_whole
from sfl.model.precision import DTYPES
from sfl.model.skeleton import build_skeleton
from sfl.model.weights import fill
from sfl.settings import Compute

_hf_logging: Any = logging  # not annotated
_hub_logging: Any = hub_logging


def load_config(name_or_dir: str | Path) -> PretrainedConfig:
    """The configuration of a model directory or a hub id. Raises `ModelError` when there is none, or its type is unknown."""
    with explained(name_or_dir):
        config = AutoConfig.from_pretrained(require_model(name_or_dir), trust_remote_code=False)
    if not isinstance(config, PretrainedConfig):
        raise ModelNotFoundError(f"'{name_or_dir}' has no model configuration")
    return config


def load_task_model(
    name_or_dir: str | Path,
    task: Task,
    labels: Sequence[str] = (),
    dtype: Compute = "fp32",
    seed: int = 0,
) -> PreTrainedModel:
    """The model for `task`, on the CPU, in eval mode, with `len(labels)` classes named by `labels`.

    A head that the checkpoint lacks, or has for another number of classes, is initialised under `seed`; the global
    generator is left as it was. The pad token comes from the tokenizer where the configuration has none.
    Raises `ModelError` when the model cannot be found, read or cut, or weights other than the head's are missing.
    """
    if dtype not in DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown: take one of {', '.join(DTYPES)}")
    require_whole(name_or_dir)
    model = build_skeleton(load_task_config(name_or_dir, task, labels), task, DTYPES[dtype])
    load_weights(model, name_or_dir, seed)
    return model


def load_weights(model: PreTrainedModel, name_or_dir: str | Path, seed: int = 0, stored_tables: bool = False) -> None:
    """Fill a skeleton, as `sfl.model.weights.fill` does, and put it in eval mode."""
    with explained(name_or_dir):
        fill(model, Checkpoint(require_model(name_or_dir)), seed, stored_tables)
    model.config.name_or_path = str(name_or_dir)
    model.eval()  # type: ignore[no-untyped-call]


def load_task_config(name_or_dir: str | Path, task: Task, labels: Sequence[str]) -> PretrainedConfig:
    """The configuration of the model for `task`, with its labels and a pad token. Raises `ModelError` as `load_task_model`."""
    config = load_config(name_or_dir)
    require_task(family_of(config), task)
    require_safetensors(name_or_dir)
    if config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(name_or_dir).pad_token_id
    config.use_cache = False
    if task == "classification":
        _set_labels(config, labels)
    return config


def load_tokenizer(name_or_dir: str | Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; its end-of-text token pads where it has no pad token. Raises `ModelError` without either."""
    with explained(name_or_dir):
        tokenizer = AutoTokenizer.from_pretrained(require_model(name_or_dir), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"the tokenizer of '{name_or_dir}' has neither a pad nor an end-of-text token: add one to it")
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def check_max_length(config: PretrainedConfig, max_length: int) -> None:
    """Raise `ModelError` unless the model takes texts of `max_length` tokens."""
    if max_length < 1:
        raise ModelError(f"a maximum length of {max_length} tokens is too short: give 1 or more")
    limit = getattr(config, "max_position_embeddings", None)  # None: BLOOM's ALiBi has no limit
    if limit is not None and config.model_type == "roberta":
        limit -= config.pad_token_id + 1  # its positions start after the pad token's id
    if limit is not None and max_length > limit:
        raise UnsupportedModelError(f"a maximum length of {max_length} tokens is more than this model takes: at most {limit}")


def require_model(name_or_dir: str | Path) -> str:
    """The name as transformers takes it, after the checks that give a clearer reason than its own."""
    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelNotFoundError(f"'{name}' is no model directory: it has no config.json")
        return str(path)
    if path.exists() or isinstance(name_or_dir, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelNotFoundError(f"there is no model directory '{name}'")
    if "/" in name and path.parent.is_dir():  # or the hub is asked for it, for half a minute where it is out of reach
        raise ModelNotFoundError(
            f"there is no model directory '{name}', and it is no hub id, as there is a folder '{path.parent}' here"
        )
    return name


def _set_labels(config: PretrainedConfig, labels: Sequence[str]) -> None:
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ModelError(f"a classifier needs two or more different labels, not {list(labels)}")
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


@contextlib.contextmanager
def explained(name_or_dir: str | Path) -> Iterator[None]:
    """Turn what transformers raises into a `ModelError`, and keep its reports and progress bars to itself."""
    verbosity, bars = _hf_logging.get_verbosity(), _hf_logging.is_progress_bar_enabled()
    hub_verbosity = _hub_logging.get_verbosity()
    _hf_logging.set_verbosity_error()
    _hub_logging.set_verbosity_error()  # or each of its attempts at a hub that is out of reach is two lines
    _hf_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise _meaning(name_or_dir, error) from error
    finally:
        _hf_logging.set_verbosity(verbosity)
        _hub_logging.set_verbosity(hub_verbosity)
        if bars:
            _hf_logging.enable_progress_bar()


def _meaning(name_or_dir: str | Path, error: Exception) -> ModelError:
    text = " ".join(str(error).split())
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return UnsupportedModelError(f"'{name_or_dir}' is of an unknown model type; those that can be cut: {', '.join(FAMILIES)}")
    if not is_directory(name_or_dir):
        return ModelNotFoundError(
            f"'{name_or_dir}' is neither a directory nor a model that the Hugging Face hub or its local cache gave: {text}"
        )
    return ModelError(f"'{name_or_dir}' cannot be loaded: {text}")
