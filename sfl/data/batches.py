"""Examples as token ids, and batches of them, in NumPy; the trainer makes tensors of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sfl.data.example import Example
from sfl.data.labels import LabelSet
from sfl.errors import DataError, TooFewExamplesError
from sfl.telemetry import log

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Encoded:
    """Tokenised examples, not padded: `input_ids[i]` is int64 of shape (length of i,); every one of its tokens counts.

    `labels` is int64 (examples,), class indices, or None for a causal LM. `pad_id` pads.
    """

    input_ids: tuple[Ids, ...]
    labels: Ids | None
    pad_id: int

    def __len__(self) -> int:
        return len(self.input_ids)

    def digest(self) -> str:
        """SHA-256 of the examples in their order, in hexadecimal."""
        digest = hashlib.sha256()
        for ids in (*self.input_ids, *(() if self.labels is None else (self.labels,))):
            digest.update(len(ids).to_bytes(8, "little"))
            digest.update(ids.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Batch:
    """`input_ids` and `attention_mask` (1 for text, 0 for padding on the right), int64 (B, T); `labels` int64 (B,) or None."""

    input_ids: Ids
    attention_mask: Ids
    labels: Ids | None

    def __len__(self) -> int:
        return len(self.input_ids)


class Position(NamedTuple):
    """Where an iteration stands: `offset` examples of `epoch` are done (both from 0)."""

    epoch: int
    offset: int


def tokenise(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, labels: LabelSet | None = None
) -> Encoded:
    """Token ids of each text, with the tokenizer's special tokens, at most `max_length` of them.

    `labels` turns classes into indices; without it (causal LM) texts of fewer than two tokens are left out, as they predict
    nothing. One warning says how many texts were cut. Raises `DataError` if nothing is left, if `max_length` leaves no room
    for text, and for a label that is not in `labels`.
    """
    special = tokenizer.num_special_tokens_to_add()
    if max_length <= special:
        raise DataError(f"max_length {max_length} leaves no room for text beside {special} special tokens: raise it")
    texts = [example.text for example in examples]
    whole: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"] if texts else []
    too_long = [i for i, ids in enumerate(whole) if len(ids) > max_length]
    if too_long:
        log.warning("%d of %d texts are longer than %d tokens and were cut", len(too_long), len(texts), max_length)
        cut = tokenizer([texts[i] for i in too_long], truncation=True, max_length=max_length)["input_ids"]
        for i, ids in zip(too_long, cut, strict=True):
            whole[i] = ids
    classes = None if labels is None else np.array([labels.index(example.label) for example in examples], dtype=np.int64)
    if labels is None and (short := sum(len(ids) < 2 for ids in whole)):
        log.warning("%d of %d texts have fewer than two tokens and are left out", short, len(whole))
        whole = [ids for ids in whole if len(ids) >= 2]
    if texts and not whole:
        raise TooFewExamplesError("no text has two tokens or more: there is nothing to predict")
    return Encoded(tuple(np.array(ids, dtype=np.int64) for ids in whole), classes, pad_id_of(tokenizer))


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The pad token's id, or the end-of-text token's where a tokenizer has none (GPT-2), or 0: masks hide it anyway."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0


class Batches:
    """Endless batches over `encoded`, epoch after epoch.

    Every example comes once an epoch: the last batch of an epoch holds what is left, so it may be smaller. With `shuffle` the
    order is a permutation drawn from (seed, epoch), else the order of the examples. Batches are padded to their longest text.
    `position` and `seek` save and restore the place; equal arguments and
    position give equal batches.
    """

    def __init__(self, encoded: Encoded, batch_size: int, *, shuffle: bool, seed: int) -> None:
        if not len(encoded):
            raise TooFewExamplesError("there are no examples to train on")
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; it must be at least 1")
        self._encoded, self._batch_size = encoded, batch_size
        self._shuffle, self._seed = shuffle, seed
        self._digest = encoded.digest()
        self.seek(Position(0, 0))

    @property
    def position(self) -> Position:
        """Where the next batch begins."""
        return self._position

    def seek(self, position: Position) -> None:
        """Go on from `position`. Raises `DataError` if these examples have no such place."""
        epoch, offset = position
        if epoch < 0 or not 0 <= offset < len(self._encoded):
            raise DataError(f"there is no {position} in {len(self._encoded)} examples: it belongs to other data")
        self._position = Position(epoch, offset)
        self._order = self._order_of(epoch)

    def state(self) -> dict[str, Any]:
        """The place, JSON-serialisable, and which examples it is a place in."""
        return {**self._position._asdict(), "examples": self._digest}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a place that was kept. In other examples than then, with more of them, say, the next epoch begins."""
        if state["examples"] == self._digest:
            self.seek(Position(state["epoch"], state["offset"]))
            return
        log.warning("the training examples are not those of before: training goes on with them at their beginning")
        self.seek(Position(state["epoch"] + 1, 0))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        epoch, offset = self._position
        chosen = self._order[offset : offset + self._batch_size]
        if offset + len(chosen) < len(self._encoded):
            self._position = Position(epoch, offset + len(chosen))
        else:
            self.seek(Position(epoch + 1, 0))
        return _batch(self._encoded, chosen)

    def _order_of(self, epoch: int) -> Ids:
        if self._shuffle:
            return np.random.default_rng((self._seed, epoch)).permutation(len(self._encoded))
        return np.arange(len(self._encoded))


def eval_batches(encoded: Encoded, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """Each example once in order, or `limit` of them, evenly spaced."""
    if batch_size < 1 or (limit is not None and limit < 1):
        raise DataError(f"batch_size {batch_size} and limit {limit} must be at least 1")
    count = len(encoded) if limit is None else min(limit, len(encoded))
    chosen = np.arange(count) * len(encoded) // max(count, 1)
    for start in range(0, count, batch_size):
        yield _batch(encoded, chosen[start : start + batch_size])


def _batch(encoded: Encoded, chosen: Ids) -> Batch:
    rows = [encoded.input_ids[i] for i in chosen]
    width = max(len(ids) for ids in rows)
    input_ids = np.full((len(rows), width), encoded.pad_id, dtype=np.int64)
    attention_mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, ids in enumerate(rows):
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
    return Batch(input_ids, attention_mask, None if encoded.labels is None else encoded.labels[chosen])
