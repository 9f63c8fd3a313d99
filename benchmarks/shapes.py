"""Models of a true shape with random weights, made on the spot: no hub is needed, and speed and memory are the same."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

_SHAPES = {
    "opt-125m": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "ffn_dim": 3072},
    "opt-350m": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "ffn_dim": 4096,
        "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    },
    "opt-1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tinyllama-1.1b": {
        "hidden_size": 2048,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
    },
}
_OF_TYPE: dict[str, dict[str, object]] = {
    "opt": {"vocab_size": 50272, "max_position_embeddings": 2048, "dropout": 0.0},
    "bert": {"vocab_size": 30522, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "llama": {"vocab_size": 32000, "max_position_embeddings": 2048, "pad_token_id": 1},
}
_TYPES = {"minilm": "bert", "tinyllama-1.1b": "llama"}
_KEPT_IN_BF16 = ("opt-1.3b", "tinyllama-1.1b")
SHAPES = tuple(_SHAPES)


def config_of(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a model, of all its layers or fewer; dropout 0 so that two runs of one step can be compared."""
    sizes = {**_SHAPES[shape], **({} if layers is None else {"num_hidden_layers": layers})}
    model_type = _TYPES.get(shape, "opt")
    return AutoConfig.for_model(model_type, **sizes, **_OF_TYPE[model_type])


def make_model(shape: str, folder: Path, layers: int | None = None) -> Path:
    """Write the model and a tokenizer of single words to `folder`, unless they are there; returns it.

    Weights are fp32, and bf16 for OPT-1.3B and TinyLlama. A BERT is the backbone alone, as such models are published.
    """
    if not (folder / "tokenizer_config.json").exists():  # which is written last
        torch.manual_seed(0)
        folder.mkdir(parents=True, exist_ok=True)
        config = config_of(shape, layers)
        auto = AutoModel if config.model_type == "bert" else AutoModelForCausalLM
        dtype = torch.bfloat16 if shape in _KEPT_IN_BF16 else torch.float32
        auto.from_config(config, dtype=dtype).save_pretrained(folder)  # type: ignore[no-untyped-call]
        vocabulary = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *map(str, range(1000))])}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        words = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **words)  # type: ignore[no-untyped-call]
        fast.save_pretrained(folder)
    return folder


def write_texts(path: Path, count: int, words: int) -> Path:
    """`count` different texts of `words` words (one token each), half of either class, as `text;label`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(str((row * 7 + word * 13) % 1000) for word in range(words)) for row in range(count)]
    path.write_text("".join(f"{line};{'ab'[row % 2]}\n" for row, line in enumerate(lines)), encoding="utf-8")
    return path


if __name__ == "__main__":  # python benchmarks/shapes.py SHAPE FOLDER
    make_model(sys.argv[1], Path(sys.argv[2]))
