"""A short name for all that a packed half is made of, so that one made of something else is never taken for it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from sfl.model.checkpoint import find_files
from sfl.model.packed import FORMAT

COPIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""The files that a half has from its model as they are, where they exist."""


def model_source(name_or_dir: str | Path, fingerprint: str) -> str:
    """SHA-256, in hex, over the format of packed halves, the model's fingerprint, and the names and bytes of `COPIED`.

    The fingerprint decides who may train together, and a device's own copy may have other files beside the same weights;
    the source decides which packed halves are the same. That of a packed half is that of the model it was taken from.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, fingerprint]).encode())
    for name, path in sorted(find_files(name_or_dir, COPIED).items()):
        content = path.read_bytes()
        digest.update(json.dumps([name, len(content)]).encode())
        digest.update(content)
    return digest.hexdigest()
