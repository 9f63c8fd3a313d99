"""Tokens and batches."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sfl.data.batches import Batches, Encoded, Position, eval_batches, tokenise
from sfl.data.example import Example, content_key
from sfl.data.labels import LabelSet
from sfl.errors import DataError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]


def tokenizer(special: bool = True, **tokens: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        inner.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", **(tokens or {"pad_token": "[PAD]"}))


def examples(*texts: str) -> list[Example]:
    return [Example(text, "yes" if "a" in text else "no", None, content_key(text)) for text in texts]


def encoded(count: int) -> Encoded:
    return Encoded(tuple(np.full(1 + i % 4, i) for i in range(count)), np.arange(count), 99)


def test_tokens_and_labels():
    result = tokenise(examples("a b", "c"), tokenizer(), 8, LabelSet(("yes", "no")))
    assert [ids.tolist() for ids in result.input_ids] == [[2, 4, 5, 3], [2, 6, 3]]
    assert result.input_ids[0].dtype == np.int64
    assert result.labels is not None and result.labels.tolist() == [0, 1]
    assert (result.pad_id, len(result)) == (0, 2)


def test_long_texts_are_cut_with_one_warning(caplog):
    result = tokenise(examples("a b c d e", "a b c", "a b c d"), tokenizer(), 5, LabelSet(("yes",)))
    assert [ids.tolist() for ids in result.input_ids] == [[2, 4, 5, 6, 3]] * 3
    assert [record.message for record in caplog.records] == ["2 of 3 texts are longer than 5 tokens and were cut"]


def test_a_causal_model_needs_two_tokens(caplog):
    result = tokenise(examples("a", "b c"), tokenizer(special=False), 8)
    assert [ids.tolist() for ids in result.input_ids] == [[5, 6]] and result.labels is None
    assert "1 of 2 texts have fewer than two tokens" in caplog.text
    with pytest.raises(DataError, match="nothing to predict"):
        tokenise(examples("a"), tokenizer(special=False), 8)


def test_without_a_pad_token_the_end_of_text_pads():
    assert tokenise(examples("a b"), tokenizer(eos_token="[SEP]"), 8).pad_id == 3
    assert tokenise(examples("a b"), tokenizer(cls_token="[CLS]"), 8).pad_id == 0


def test_wrong_lengths_and_labels_are_refused():
    with pytest.raises(DataError, match="max_length 2 leaves no room for text beside 2 special tokens"):
        tokenise(examples("a"), tokenizer(), 2)
    with pytest.raises(DataError, match="label 'no' is not among"):
        tokenise(examples("b"), tokenizer(), 8, LabelSet(("yes",)))


def test_batches_are_padded_on_the_right_to_their_longest():
    batch = next(Batches(encoded(8), 2, shuffle=False, seed=0))
    assert batch.input_ids.tolist() == [[0, 99], [1, 1]]
    assert batch.attention_mask.tolist() == [[1, 0], [1, 1]]
    assert batch.labels is not None and batch.labels.tolist() == [0, 1] and len(batch) == 2
    assert batch.input_ids.dtype == batch.attention_mask.dtype == batch.labels.dtype == np.int64


def places(batches: Batches, count: int) -> list[list[int]]:
    return [batch.labels.tolist() for batch in islice(batches, count)]


def test_file_order_and_the_short_last_batch():
    assert places(Batches(encoded(5), 2, shuffle=False, seed=0), 4) == [[0, 1], [2, 3], [4], [0, 1]]
    assert places(Batches(encoded(3), 8, shuffle=False, seed=0), 2) == [[0, 1, 2], [0, 1, 2]]


def test_every_epoch_is_another_permutation():
    drawn = places(Batches(encoded(50), 10, shuffle=True, seed=3), 10)
    first, second = [i for batch in drawn[:5] for i in batch], [i for batch in drawn[5:] for i in batch]
    assert sorted(first) == sorted(second) == list(range(50))
    assert len({tuple(first), tuple(second), tuple(range(50))}) == 3
    assert drawn == places(Batches(encoded(50), 10, shuffle=True, seed=3), 10)
    assert drawn != places(Batches(encoded(50), 10, shuffle=True, seed=4), 10)


def test_a_position_restores_the_place():
    batches = Batches(encoded(7), 3, shuffle=True, seed=1)
    places(batches, 4)
    saved = batches.position
    assert saved == Position(1, 3)
    ahead = places(batches, 5)
    again = Batches(encoded(7), 3, shuffle=True, seed=1)
    again.seek(Position(*saved))
    assert places(again, 5) == ahead
    with pytest.raises(DataError, match="it belongs to other data"):
        again.seek(Position(0, 7))


def test_nothing_to_train_on_is_refused():
    with pytest.raises(DataError, match="no examples"):
        Batches(encoded(0), 2, shuffle=False, seed=0)
    with pytest.raises(DataError, match="at least 1"):
        Batches(encoded(2), 0, shuffle=False, seed=0)


def test_evaluation_is_finite_and_limits_are_spaced():
    assert [batch.labels.tolist() for batch in eval_batches(encoded(5), 2)] == [[0, 1], [2, 3], [4]]
    assert [batch.labels.tolist() for batch in eval_batches(encoded(10), 4, limit=5)] == [[0, 2, 4, 6], [8]]
    assert sum(len(batch) for batch in eval_batches(encoded(3), 4, limit=50)) == 3
    assert list(eval_batches(encoded(0), 4)) == []
    with pytest.raises(DataError, match="at least 1"):
        next(eval_batches(encoded(3), 0))


def test_a_kept_place_is_found_again_and_is_none_in_other_examples(caplog):
    batches = Batches(encoded(7), 3, shuffle=True, seed=1)
    places(batches, 4)
    state = json.loads(json.dumps(batches.state()))
    ahead = places(batches, 5)
    again = Batches(encoded(7), 3, shuffle=True, seed=1)
    again.restore(state)
    assert places(again, 5) == ahead
    assert not caplog.text
    grown = Batches(encoded(9), 3, shuffle=True, seed=1)
    grown.restore(state)
    assert grown.position == Position(state["epoch"] + 1, 0)
    assert "not those of before" in caplog.text


def test_examples_are_told_apart_by_any_of_their_tokens_and_labels():
    one = encoded(4)
    digests = {one.digest(), encoded(5).digest(), encoded(4).digest()}
    assert len(digests) == 2
    other = Encoded((*one.input_ids[:3], one.input_ids[3] + 1), one.labels, one.pad_id)
    relabelled = Encoded(one.input_ids, one.labels[::-1].copy(), one.pad_id)
    unlabelled = Encoded(one.input_ids, None, one.pad_id)
    joined = Encoded((np.concatenate(one.input_ids[:2]), *one.input_ids[2:]), None, one.pad_id)
    assert len({each.digest() for each in (one, other, relabelled, unlabelled, joined)}) == 5
