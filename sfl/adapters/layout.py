"""What an adapter belongs to: enough to write it where PEFT, or `sfl eval`, can load it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass


@dataclass(frozen=True)
class LoraSpec:
    """The LoRA settings that both halves of an adapter must share.

    `target_modules` are module names inside a block, as peft takes them; never empty once resolved against a model.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()

    def difference(self, other: LoraSpec) -> str | None:
        """The first setting in which the two differ, as text such as "rank 8 against 16"; None if they agree."""
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if mine != theirs:
                return f"{field.name} {mine} against {theirs}"
        return None


@dataclass(frozen=True)
class AdapterLayout:
    """Where an adapter's tensors sit in the uncut model, and what the model was trained to do with them.

    `blocks` is the dotted path of the block list in the task model ("model.decoder.layers"); `head` the paths of the
    trained head modules (empty for a causal LM). `labels` are the class names in the order of the logits. `columns` (a
    flow's, or those of the text; empty: `text` alone) and `max_length` (tokens) say how a text was made and cut, so that an
    evaluation can do the same.
    """

    base_model: str
    model_fingerprint: str
    task: str
    lora: LoraSpec
    blocks: str
    head: tuple[str, ...]
    num_layers: int
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    max_length: int = 64
