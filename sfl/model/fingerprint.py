"""A short name for a model's weights, so that two parties find out at the join whether they hold the same base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers.utils.hub import cached_file

from sfl.errors import ModelError
from sfl.model.load import is_directory, load_config, require_safetensors

_SAMPLE = 4096  # bytes read from either end of a tensor
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "max_position_embeddings",
    "word_embed_proj_dim",
    "do_layer_norm_before",
)


class _Stored(NamedTuple):
    file: Path
    start: int
    stop: int
    dtype: str
    shape: list[int]


def model_fingerprint(name_or_dir: str | Path) -> str:
    """SHA-256, in hex, over the model type and sizes and each tensor's name, dtype, shape and first and last 4 KiB.

    Read straight from the safetensors files, so it takes no longer for a large model; the same however the checkpoint is
    sharded. Raises `ModelError` when there are no safetensors, or one is truncated or no safetensors file.
    """
    config = load_config(name_or_dir)
    require_safetensors(name_or_dir)
    digest = hashlib.sha256()
    digest.update(json.dumps([config.model_type, *(getattr(config, size, None) for size in _SIZES)]).encode())
    tensors = {name: tensor for file in _weight_files(name_or_dir) for name, tensor in _header(file).items()}
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.start)
            digest.update(stream.read(min(_SAMPLE, tensor.stop - tensor.start)))
            stream.seek(max(tensor.start, tensor.stop - _SAMPLE))
            digest.update(stream.read(min(_SAMPLE, tensor.stop - tensor.start)))
    return digest.hexdigest()


def _weight_files(name_or_dir: str | Path) -> list[Path]:
    """The safetensors files that transformers would load: the whole one, else those that the index names."""
    whole = _file(name_or_dir, "model.safetensors")
    if whole is not None:
        return [whole]
    index = _file(name_or_dir, "model.safetensors.index.json")
    if index is None:
        raise ModelError(f"'{name_or_dir}' has neither model.safetensors nor an index of its parts")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{index}' is no safetensors index ({error}): fetch it again") from error
    files = [_file(name_or_dir, name) for name in names]
    for name, file in zip(names, files, strict=True):
        if file is None:
            raise ModelError(f"'{name_or_dir}' lacks the weights file {name} that its index names: fetch it again")
    return [file for file in files if file is not None]


def _file(name_or_dir: str | Path, name: str) -> Path | None:
    if is_directory(name_or_dir):
        path = Path(name_or_dir).expanduser() / name
        return path if path.is_file() else None
    found = cached_file(
        str(name_or_dir), name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def _header(file: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file: 8 bytes of header length, the header as JSON, then the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        text = stream.read(length) if 2 <= length <= size - 8 else b""
    try:
        entries: dict[str, Any] = json.loads(text)
        entries.pop("__metadata__", None)
        tensors = {
            name: _Stored(file, 8 + length + start, 8 + length + stop, entry["dtype"], entry["shape"])
            for name, entry in entries.items()
            for start, stop in [entry["data_offsets"]]
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{file}' is no safetensors file, or is truncated: fetch it again") from error
    if any(tensor.stop > size or tensor.start > tensor.stop for tensor in tensors.values()):
        raise ModelError(f"'{file}' is truncated at {size} bytes: fetch it again")
    return tensors
