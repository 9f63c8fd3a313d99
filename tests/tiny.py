"""Tiny models with random weights, and tokenizers for them, made on the spot."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as hf_logging

PAD, UNK, BOS, EOS = "<pad>", "<unk>", "<s>", "</s>"
_LINES = (
    "proto tcp service http duration 0.12 orig_bytes 512 resp_bytes 2048 conn_state SF history ShADadFf",
    "proto udp service dns duration 1.5 orig_bytes 64 resp_bytes 128 conn_state S0 history Dd label benign malicious",
    "the quick brown fox jumps over the lazy dog 0 1 2 3 4 5 6 7 8 9 - . : ; , =",
)

_CHARACTERS = string.ascii_letters + string.digits + string.punctuation

# Beside what all share: what each family calls its sizes, its dropouts (0), and what makes it worth a test.
_ROTARY = {"num_key_value_heads": 2, "head_dim": 16, "attention_dropout": 0.0}
_SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NEO = {"attention_types": [[["global", "local"], 2]], "window_size": 4, "resid_dropout": 0.0, "embed_dropout": 0.0}
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("opt", {"ffn_dim": 64, "dropout": 0.0, "attention_dropout": 0.0}),
    "opt-post-norm": (
        "opt",
        {"ffn_dim": 64, "dropout": 0.0, "attention_dropout": 0.0, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt_neo": ("gpt_neo", {**_NEO, "attention_dropout": 0.0}),
    "gpt_neox": ("gpt_neox", {"attention_dropout": 0.0, "hidden_dropout": 0.0}),
    "bloom": ("bloom", {"hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "llama": ("llama", _ROTARY),
    "mistral": ("mistral", {**_ROTARY, "sliding_window": 4}),
    "qwen2": ("qwen2", {**_ROTARY, **_SLIDING, "use_sliding_window": True}),
    "qwen3": ("qwen3", _ROTARY),
    "gemma2": ("gemma2", {**_ROTARY, **_SLIDING}),
    "gemma3_text": ("gemma3_text", {**_ROTARY, **_SLIDING}),
    "phi3": ("phi3", {"num_key_value_heads": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_dropout": 0.0}),
    "bert": ("bert", _BERT),
    "roberta": ("roberta", _BERT),
    "distilbert": ("distilbert", {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}),
}
FAMILIES = tuple(_FAMILIES)
CLASSIFIERS_ONLY = ("bert", "roberta", "distilbert")


def tiny_config(family: str = "bert", layers: int = 4, hidden: int = 32, vocab: int = 128, **changes: Any) -> PretrainedConfig:
    """A configuration of `family` (one of `FAMILIES`) with all dropouts 0, 2 heads, 128 positions; `changes` override."""
    model_type, special = _FAMILIES[family]
    common: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "max_position_embeddings": 130 if model_type == "roberta" else 128,
        "pad_token_id": 1 if model_type == "roberta" else 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if model_type == "distilbert":
        common["hidden_dim"] = 64
    elif model_type not in ("opt", "bloom", "gpt2"):
        common["intermediate_size"] = 64
    special = dict(special)
    if "layer_types" in special:
        special["layer_types"] = (special["layer_types"] * layers)[:layers]
    if "head_dim" in special:
        special["head_dim"] = hidden // 2
    if "attention_types" in special:
        special["attention_types"] = [[["global", "local"], layers // 2]]
    return AutoConfig.for_model(model_type, **{**common, **special, **changes})


def tiny_model(config: PretrainedConfig, task: str = "classification", labels: int = 3, seed: int = 0) -> PreTrainedModel:
    """A model of `config` in eval mode, its weights random under `seed` and wide enough that every part shows in the logits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if task == "classification":
            config.num_labels = labels
            config.problem_type = "single_label_classification"
            model = AutoModelForSequenceClassification.from_config(config)
        else:
            model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def save_tiny_tokenizer(directory: Path, config: PretrainedConfig) -> None:
    """A WordPiece tokenizer of whole words and single characters, always the same, with the configuration's pad token."""
    specials = [UNK, PAD, BOS, EOS] if config.pad_token_id == 1 else [PAD, UNK, BOS, EOS]
    words = dict.fromkeys(" ".join(_LINES).split())
    tokens = list(dict.fromkeys([*specials, *words, *_CHARACTERS, *(f"##{c}" for c in _CHARACTERS)]))
    if len(tokens) > config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens: give the model a vocabulary of that size or more")
    tokenizer = Tokenizer(models.WordPiece({token: index for index, token in enumerate(tokens)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNK, bos_token=BOS, eos_token=EOS)
    fast.save_pretrained(directory)


def save_tiny_model(
    directory: Path | str,
    family: str = "bert",
    task: str | None = None,
    layers: int = 4,
    hidden: int = 32,
    vocab: int = 320,
    seed: int = 0,
    labels: int = 3,
    **changes: Any,
) -> Path:
    """Write config, safetensors and a tokenizer that transformers loads by itself; returns the directory.

    Without `task` the checkpoint is one as it is published: a causal LM, or for an encoder the backbone alone, so that a
    classifier's head is missing. `changes` override the configuration (a dropout, say).
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, layers, hidden, vocab, **changes)
    encoder = config.model_type in CLASSIFIERS_ONLY
    model = tiny_model(config, task or ("classification" if encoder else "causal-lm"), labels, seed)
    hf_logging.disable_progress_bar()
    (model.base_model if task is None and encoder else model).save_pretrained(path)
    save_tiny_tokenizer(path, config)
    return path


def tiny_batch(config: PretrainedConfig, batch: int = 3, length: int = 10, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (B, T) and mask (B, T), int64, padded on the right to different lengths; the first row is full."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, config.vocab_size, (batch, length), generator=generator)
    lengths = torch.tensor([length, *torch.randint(2, length, (batch - 1,), generator=generator).tolist()])
    mask = (torch.arange(length)[None, :] < lengths[:, None]).long()
    return torch.where(mask.bool(), ids, config.pad_token_id), mask
