"""A short name for a model's weights, so that two parties find out at the join whether they hold the same base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sfl.model.checkpoint import Checkpoint
from sfl.model.load import load_config
from sfl.model.packed import read_packed

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


def model_fingerprint(name_or_dir: str | Path) -> str:
    """SHA-256, in hex, over the model type and sizes and each tensor's name, dtype, shape and first and last 4 KiB.

    Read straight from the safetensors files, so it takes no longer for a large model; the same however the checkpoint is
    sharded. A packed half has that of the model it was taken from. Neither the tokenizer nor the rest of the configuration
    counts, as another version of transformers writes them otherwise; `sfl.model.source` has a name for those, too.
    Raises `ModelError` when there are no safetensors, or one is truncated or no safetensors file.
    """
    config = load_config(name_or_dir)
    packed = read_packed(name_or_dir)
    if packed is not None:
        return packed.fingerprint
    digest = hashlib.sha256()
    digest.update(json.dumps([config.model_type, *(getattr(config, size, None) for size in _SIZES)]).encode())
    for name, tensor in sorted(Checkpoint(name_or_dir).all_tensors().items()):
        digest.update(json.dumps([name, tensor.dtype_name, list(tensor.shape)]).encode())
        with tensor.file.path.open("rb") as stream:
            stream.seek(tensor.start)
            digest.update(stream.read(min(_SAMPLE, tensor.stop - tensor.start)))
            stream.seek(max(tensor.start, tensor.stop - _SAMPLE))
            digest.update(stream.read(min(_SAMPLE, tensor.stop - tensor.start)))
    return digest.hexdigest()
