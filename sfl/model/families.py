"""The model families that can be cut, and where each keeps its blocks."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from sfl.data.settings import Task
from sfl.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Where a family's Hugging Face task models keep their parts; all paths start at the task model.

    `blocks` is the list of blocks, `tail` the modules of the backbone that run after them. `head` are the modules that a
    sequence classifier adds and that therefore have to be trained. `returns_tuple` says what a block returns: `(hidden,)`
    or `hidden`. `lora_targets` are the LoRA targets where peft has no default of its own.
    """

    model_type: str
    blocks: str
    tail: tuple[str, ...]
    head: tuple[str, ...] = ("score",)
    tasks: tuple[Task, ...] = ("classification", "causal-lm")
    returns_tuple: bool = False
    lora_targets: tuple[str, ...] = ()

    @property
    def backbone(self) -> str:
        """The backbone's name in the task model, as in `model` or `transformer`."""
        return self.blocks.partition(".")[0]


def _llama_like(model_type: str, lora_targets: tuple[str, ...] = ()) -> Family:
    return Family(model_type, "model.layers", ("model.norm",), lora_targets=lora_targets)


def _encoder(model_type: str, blocks: str, tail: tuple[str, ...], head: tuple[str, ...], targets: tuple[str, ...] = ()) -> Family:
    return Family(model_type, blocks, tail, head, tasks=("classification",), lora_targets=targets)


_FAMILIES = (
    Family("opt", "model.decoder.layers", ("model.decoder.final_layer_norm", "model.decoder.project_out")),
    Family("gpt2", "transformer.h", ("transformer.ln_f",)),
    Family("gpt_neo", "transformer.h", ("transformer.ln_f",), returns_tuple=True),
    Family("gpt_neox", "gpt_neox.layers", ("gpt_neox.final_layer_norm",)),
    Family("bloom", "transformer.h", ("transformer.ln_f",), returns_tuple=True),
    _llama_like("llama"),
    _llama_like("mistral"),
    _llama_like("qwen2"),
    _llama_like("qwen3"),
    _llama_like("gemma2"),
    _llama_like("gemma3_text"),
    _llama_like("phi3", ("qkv_proj",)),
    _encoder("bert", "bert.encoder.layer", ("bert.pooler",), ("classifier",)),
    _encoder("roberta", "roberta.encoder.layer", ("roberta.pooler",), ("classifier",)),
    _encoder("distilbert", "distilbert.transformer.layer", (), ("pre_classifier", "classifier"), ("q_lin", "v_lin")),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}

_REASONS = {
    "albert": "its blocks are one and the same object, used again and again",
    "deberta-v2": "its blocks exchange more than the hidden state",
    "xlnet": "its blocks exchange more than the hidden state",
    "t5": "it has an encoder and a decoder",
}


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model's configuration. Raises `ModelError` for a family that cannot be cut."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        reason = _REASONS.get(config.model_type, "this family is unknown to sfl")
        raise UnsupportedModelError(
            f"a model of type '{config.model_type}' cannot be cut: {reason}. Take one of these: {', '.join(FAMILIES)}"
        )
    return family


def require_task(family: Family, task: str) -> None:
    """Raise `ModelError` when the family has no model for `task`."""
    if task not in family.tasks:
        raise UnsupportedModelError(
            f"a model of type '{family.model_type}' has no task '{task}': it has {', '.join(family.tasks)}"
        )
