"""A task model taken apart at a cut layer: blocks are replaced, no forward pass is rewritten.

Both halves keep a block list of the full length, so that the model's own forward still finds every block's mask and
rotary table from its configuration. A cut at k leaves blocks 0 to k-1 on the device and k to L-1 at the edge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from sfl.errors import ModelError, UnsupportedModelError
from sfl.model.families import Family, family_of


class PassThrough(nn.Module):
    """Stands for a block that lives elsewhere: returns its input as the family's blocks return their output."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        return (hidden_states,) if self.returns_tuple else hidden_states


class Source(nn.Module):
    """Stands for block 0 at the edge: ignores its input and returns the hidden state that was received."""

    def __init__(self, returns_tuple: bool) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.hidden: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        if self.hidden is None:
            raise ModelError("the edge's half ran without a received hidden state: call EdgeHalf, not its model")
        return (self.hidden,) if self.returns_tuple else self.hidden


class PlaceholderEmbedding(nn.Module):
    """Stands for the token embedding at the edge, where block 0 ignores what comes in: zeros of the right shape and dtype."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.width = width
        self.dtype = dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.zeros((), dtype=self.dtype, device=input_ids.device).expand(*input_ids.shape, self.width)


class DeviceHalf(nn.Module):
    """Embeddings and blocks 0 to `cut` - 1 of `model`, which is taken apart: what comes after is dropped.

    Raises `ModelError` for a family that cannot be cut or a cut outside 1 to L-1.
    """

    def __init__(self, model: PreTrainedModel, cut: int) -> None:
        super().__init__()
        self.config = model.config
        self.family = family_of(model.config)
        self.cut = cut
        check_cut(model.config, cut)
        _prepare(model)
        drop_above(model, cut)
        self.backbone: nn.Module = getattr(model, self.family.backbone)
        blocks = _block_list(model, self.family, range(cut))
        for name, _ in list(model.named_children()):
            if name != self.family.backbone:
                delattr(model, name)  # so that the head is freed even where the caller keeps the model
        self.own_blocks: dict[int, nn.Module] = {index: blocks[index] for index in range(cut)}
        self.head: dict[str, nn.Module] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The hidden state that would enter block `cut`: (B, T, H) in the dtype of the activations, in CPU memory.

        It comes from (B, T) int64 ids and mask, which are moved to where the half computes.
        """
        place = next(self.parameters()).device
        hidden: Tensor = self.backbone(input_ids=input_ids.to(place), attention_mask=attention_mask.to(place)).last_hidden_state
        return hidden.cpu()


class EdgeOutput(NamedTuple):
    """`loss` is a scalar, None without labels; `logits` are (B, classes) or, for a causal LM, (B, T, vocabulary)."""

    loss: Tensor | None
    logits: Tensor


class EdgeHalf(nn.Module):
    """Blocks `lowest_cut` to L-1 of `model`, held once, with the modules after them, for devices cut there or deeper.

    Each cut is a view: a block list of its own over the same block objects. A view runs the embeddings on placeholder ids,
    whose result is ignored, so the token embedding gives zeros; a tied LM head keeps the matrix for itself.
    Raises `ModelError` for a family that cannot be cut, a cut outside 1 to L-1, or a classifier without a pad token.
    """

    def __init__(self, model: PreTrainedModel, lowest_cut: int, dtype: torch.dtype | None = None) -> None:
        """`dtype` is that of the activations, for a model whose first weight is kept in another."""
        super().__init__()
        self.config = model.config
        self.family = family_of(model.config)
        self.lowest_cut = lowest_cut
        check_cut(model.config, lowest_cut)
        _prepare(model)
        self.model = model
        _drop_embedding(model)
        self._dtype = dtype or model.dtype
        trained = {name: getattr(model, name, None) for name in self.family.head}
        self.head: dict[str, nn.Module] = {name: module for name, module in trained.items() if module is not None}
        if self.head and model.config.pad_token_id is None:
            raise ModelError("the classifier's configuration has no pad_token_id: set it to the tokenizer's")
        blocks = _block_list(model, self.family, range(lowest_cut, model.config.num_hidden_layers))
        self.own_blocks: dict[int, nn.Module] = {index: blocks[index] for index in range(lowest_cut, len(blocks))}
        self._source = Source(self.family.returns_tuple)
        self._pass = PassThrough(self.family.returns_tuple)
        self._views: dict[int, nn.ModuleList] = {}
        self._show(lowest_cut)

    def forward(self, hidden: Tensor, attention_mask: Tensor, labels: Tensor | None, cut: int) -> EdgeOutput:
        """Loss and logits for a hidden state that left a device at `cut`.

        `hidden` is (B, T, H) in any float dtype; where it requires a gradient, `loss.backward()` leaves it in `hidden.grad`.
        `attention_mask` is (B, T) int64, 1 on tokens; `labels` as `sfl.model.tasks.make_labels` makes them.
        All are moved to where the half computes, and what is returned stays there.
        Raises `ModelError` when the edge has no blocks for this cut, or the shapes disagree. Not reentrant.
        """
        self._require(cut)
        if hidden.shape != (*attention_mask.shape, self.config.hidden_size):
            raise ModelError(
                f"hidden state of shape {tuple(hidden.shape)} does not fit a mask of shape {tuple(attention_mask.shape)}"
                f" and a hidden size of {self.config.hidden_size}"
            )
        self._show(cut)
        place = next(self.parameters()).device
        attention_mask, labels = attention_mask.to(place), None if labels is None else labels.to(place)
        self._source.hidden = hidden.to(place, self._dtype)
        try:
            output = self.model(input_ids=self._placeholders(attention_mask), attention_mask=attention_mask, labels=labels)
        finally:
            self._source.hidden = None
            self._show(self.lowest_cut)
        return EdgeOutput(output.loss, output.logits)

    def _require(self, cut: int) -> None:
        check_cut(self.config, cut)
        if cut < self.lowest_cut:
            raise ModelError(f"cut {cut} is below this edge's lowest cut, {self.lowest_cut}: it holds no blocks for it")

    def _show(self, cut: int) -> None:
        """Make the model walk the blocks of this cut's view."""
        if cut not in self._views:
            length = self.config.num_hidden_layers
            passed = [self._pass] * (cut - 1)
            self._views[cut] = nn.ModuleList([self._source, *passed, *(self.own_blocks[i] for i in range(cut, length))])
        path, _, name = self.family.blocks.rpartition(".")
        setattr(self.model.get_submodule(path), name, self._views[cut])

    def _placeholders(self, attention_mask: Tensor) -> Tensor:
        """Ids that tell padding from text: classifiers find the last token, and RoBERTa positions, from the ids."""
        pad = self.config.pad_token_id or 0
        return torch.where(attention_mask.bool(), 1 if pad == 0 else 0, pad)


def check_cut(config: PretrainedConfig, cut: int) -> None:
    """Raise `ModelError` for a family that cannot be cut, and unless `cut` leaves at least one block on either side."""
    family_of(config)  # first: not every other family's configuration has a number of blocks
    length = config.num_hidden_layers
    if not 1 <= cut <= length - 1:
        raise UnsupportedModelError(
            f"cut {cut} is not possible: this model has {length} blocks, so a cut is between 1 and {length - 1}"
        )


def drop_above(model: PreTrainedModel, cut: int) -> None:
    """Replace block `cut` and all above it, and what the backbone runs after them: what a device does without."""
    family = family_of(model.config)
    blocks = _block_list(model, family, ())
    for index in range(cut, len(blocks)):
        blocks[index] = PassThrough(family.returns_tuple)
    for path in family.tail:
        _replace_if_there(model, path, nn.Identity())


def drop_below(model: PreTrainedModel, cut: int) -> None:
    """Replace the blocks below `cut`: what an edge whose lowest cut this is does without."""
    family = family_of(model.config)
    blocks = _block_list(model, family, ())
    for index in range(cut):
        blocks[index] = PassThrough(family.returns_tuple)
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if head is None or not model.config.tie_word_embeddings:  # a tied LM head has to be loaded from the token embedding
        _drop_embedding(model)


def held_blocks(model: PreTrainedModel, lowest_cut: int) -> list[nn.Module]:
    """The blocks that an edge with this lowest cut keeps."""
    return list(_block_list(model, family_of(model.config), ()))[lowest_cut:]


def _drop_embedding(model: PreTrainedModel) -> None:
    embedding = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        model.set_input_embeddings(PlaceholderEmbedding(embedding.embedding_dim, embedding.weight.dtype))
    backbone: nn.Module = getattr(model, family_of(model.config).backbone)
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Dropout) and not f"{name}.".startswith(f"{family_of(model.config).blocks.partition('.')[2]}."):
            module.p = 0.0  # of zeros, and each takes as long as one that matters


def _prepare(model: PreTrainedModel) -> None:
    model.config.use_cache = False
    model.config.return_dict = True
    for module in model.modules():
        if hasattr(module, "layerdrop"):  # OPT would skip the source or a pass-through at random
            setattr(module, "layerdrop", 0.0)  # noqa: B010


def _block_list(model: PreTrainedModel, family: Family, wanted: Iterable[int]) -> nn.ModuleList:
    blocks = model.get_submodule(family.blocks)
    length = model.config.num_hidden_layers
    if not isinstance(blocks, nn.ModuleList) or len(blocks) != length:
        raise ModelError(f"expected {length} blocks at '{family.blocks}'")
    if any(isinstance(blocks[index], (Source, PassThrough)) for index in wanted):
        raise ModelError("blocks are missing, as this model was cut before: load it anew for another cut")
    return blocks


def _replace_if_there(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    if getattr(parent, name, None) is not None:
        setattr(parent, name, module)
