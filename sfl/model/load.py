"""Configurations, task models and tokenizers, from a directory or the Hugging Face hub; never from pickled weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from sfl.data.settings import Task
from sfl.errors import ModelError
from sfl.model.families import FAMILIES, Family, family_of, require_task
from sfl.settings import Precision

_hf_logging: Any = logging  # not annotated
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_name(dtype: torch.dtype) -> str:
    """What settings and messages call a model's `dtype`: `fp32` or `bf16`."""
    return next((name for name, known in _DTYPES.items() if known == dtype), str(dtype))


def load_config(name_or_dir: str | Path) -> PretrainedConfig:
    """The configuration of a model directory or a hub id. Raises `ModelError` when there is none, or its type is unknown."""
    with _explained(name_or_dir):
        config = AutoConfig.from_pretrained(_require_model(name_or_dir))
    if not isinstance(config, PretrainedConfig):
        raise ModelError(f"'{name_or_dir}' has no model configuration")
    return config


def load_task_model(
    name_or_dir: str | Path,
    task: Task,
    labels: Sequence[str] = (),
    dtype: Precision = "fp32",
    seed: int = 0,
    drop: Callable[[PreTrainedModel], None] | None = None,
) -> PreTrainedModel:
    """The model for `task`, on the CPU, in eval mode, with `len(labels)` classes named by `labels`.

    `drop` may remove modules from the model while it has no weights yet: theirs are then never read.

    A head that the checkpoint lacks, or has for another number of classes, is initialised under `seed`; the global
    generator is left as it was. The pad token comes from the tokenizer where the configuration has none.
    Raises `ModelError` when the model cannot be found, read or cut, or weights other than the head's are missing.
    """
    config = load_config(name_or_dir)
    family = family_of(config)
    require_task(family, task)
    require_safetensors(name_or_dir)
    if dtype not in _DTYPES:
        raise ModelError(f"dtype '{dtype}' is unknown: take one of {', '.join(_DTYPES)}")
    if config.pad_token_id is None:
        config.pad_token_id = load_tokenizer(name_or_dir).pad_token_id
    config.use_cache = False
    if task == "classification":
        _set_labels(config, labels)
    model_class = _model_class(config, task)
    if drop is not None:
        model_class = _without(model_class, drop)
    with _explained(name_or_dir), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, info = model_class.from_pretrained(
            _require_model(name_or_dir),
            config=config,
            dtype=_DTYPES[dtype],
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _require_weights(name_or_dir, family, task, info)
    loaded: PreTrainedModel = model.eval()
    return loaded


def _model_class(config: PretrainedConfig, task: Task) -> Any:
    mapping = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if task == "classification" else MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping[type(config)]


def _without(whole: Any, drop: Callable[[PreTrainedModel], None]) -> Any:
    """The model class `whole` less what `drop` removes: transformers asks a checkpoint only for what the model then has."""

    def build(self: Any, config: PretrainedConfig) -> None:
        whole.__init__(self, config)
        drop(self)

    # Name and module stay, as transformers goes by them when it translates a checkpoint's names to the model's.
    return type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})


def load_tokenizer(name_or_dir: str | Path) -> PreTrainedTokenizerBase:
    """The model's own tokenizer; its end-of-text token pads where it has no pad token. Raises `ModelError` without either."""
    with _explained(name_or_dir):
        tokenizer = AutoTokenizer.from_pretrained(_require_model(name_or_dir))
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
        raise ModelError(f"a maximum length of {max_length} tokens is more than this model takes: at most {limit}")


def is_directory(name_or_dir: str | Path) -> bool:
    """Whether this names a model directory; a hub id such as `facebook/opt-125m` otherwise."""
    return Path(name_or_dir).expanduser().is_dir()


def _require_model(name_or_dir: str | Path) -> str:
    """The name as transformers takes it, after the checks that give a clearer reason than its own."""
    name, path = str(name_or_dir), Path(name_or_dir).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"'{name}' is no model directory: it has no config.json")
        return str(path)
    if path.exists() or isinstance(name_or_dir, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"there is no model directory '{name}'")
    return name


def require_safetensors(name_or_dir: str | Path) -> None:
    """Raise `ModelError` when a model directory has no weights in safetensors; a hub id passes."""
    if is_directory(name_or_dir) and not list(Path(name_or_dir).expanduser().glob("*.safetensors")):
        raise ModelError(
            f"'{name_or_dir}' has no weights in safetensors; pickled weights (.bin, .pt) are never loaded:"
            " convert them once with save_pretrained(..., safe_serialization=True) where you trust their source"
        )


def _set_labels(config: PretrainedConfig, labels: Sequence[str]) -> None:
    if len(labels) < 2 or len(set(labels)) != len(labels):
        raise ModelError(f"a classifier needs two or more different labels, not {list(labels)}")
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    config.problem_type = "single_label_classification"


def _require_weights(name_or_dir: str | Path, family: Family, task: Task, info: dict[str, Any]) -> None:
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if task == "classification":
        missing = [name for name in missing if name.partition(".")[0] not in family.head]
    if missing:
        raise ModelError(
            f"the checkpoint '{name_or_dir}' lacks {len(missing)} weights of the model or has them in another shape,"
            f" the first being {missing[0]}: it belongs to another model or task"
        )


@contextlib.contextmanager
def _explained(name_or_dir: str | Path) -> Iterator[None]:
    """Turn what transformers raises into a `ModelError`, and keep its reports and progress bars to itself."""
    verbosity, bars = _hf_logging.get_verbosity(), _hf_logging.is_progress_bar_enabled()
    _hf_logging.set_verbosity_error()
    _hf_logging.disable_progress_bar()
    try:
        yield
    except SafetensorError as error:
        raise ModelError(f"the weights of '{name_or_dir}' are damaged or truncated ({error}): fetch them again") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(_reason(name_or_dir, error)) from error
    finally:
        _hf_logging.set_verbosity(verbosity)
        if bars:
            _hf_logging.enable_progress_bar()


def _reason(name_or_dir: str | Path, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        return f"'{name_or_dir}' is of an unknown model type; those that can be cut: {', '.join(FAMILIES)}"
    if not is_directory(name_or_dir):
        return f"'{name_or_dir}' is neither a directory nor a model that the Hugging Face hub or its local cache gave: {text}"
    return f"'{name_or_dir}' cannot be loaded: {text}"
