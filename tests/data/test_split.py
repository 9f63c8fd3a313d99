"""Splits, parts and labels: nothing leaks, nothing is lost, nothing is drawn by chance."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.data.example import Example, content_key
from sfl.data.labels import LabelSet
from sfl.data.partition import take_part
from sfl.data.split import drop_repeats, split_examples
from sfl.errors import DataError


def example(content: str, label: str | None = "a", time: float | None = None) -> Example:
    return Example(content, label, time, content_key(content))


def many(count: int, classes: int = 3) -> list[Example]:
    return [example(str(i), f"class {i % classes}", float(-i)) for i in range(count)]


def test_repeats_are_the_same_content_and_label():
    first, other, again = example("x", "a", 1.0), example("x", "b", 2.0), example("x", "a", 3.0)
    assert drop_repeats([first, other, again, example("y")]) == [first, other, example("y")]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.randoms(use_true_random=False), st.sampled_from([0.0, 0.2, 0.4]))
def test_hash_split_keeps_equal_content_together(start, rng, test):
    examples = [example(str(start + i), label=str(copy)) for i in range(100) for copy in range(rng.randint(1, 3))]
    rng.shuffle(examples)
    splits = split_examples(examples, "hash", 0.3, test)
    parts = [splits.train, splits.validation, splits.test]
    assert Counter(e.key for e in examples) == Counter(e.key for part in parts for e in part)
    keys = [{e.key for e in part} for part in parts]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]


def test_hash_split_is_the_same_in_any_company():
    examples = many(2000)
    whole, half = split_examples(examples, "hash", 0.1, 0.2), split_examples(examples[::2], "hash", 0.1, 0.2)
    assert set(half.test) == set(whole.test) & set(examples[::2])
    assert set(half.train) == set(whole.train) & set(examples[::2])
    assert 0.17 < len(whole.test) / 2000 < 0.23 and 0.08 < len(whole.validation) / 2000 < 0.12


def test_where_known_content_falls():
    """Pinned: were it to change, old test examples would be trained on."""
    splits = split_examples(many(12), "hash", 0.3, 0.3)
    assert [e.text for e in splits.train] == ["0", "2", "10"]
    assert [e.text for e in splits.validation] == ["4", "5", "8", "11"]
    assert [e.text for e in splits.test] == ["1", "3", "6", "7", "9"]


def test_time_split_tests_the_latest():
    examples = many(100)
    splits = split_examples(examples, "time", 0.1, 0.2)
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [70, 10, 20]
    assert [*splits.train, *splits.validation, *splits.test] == examples[::-1]
    assert splits.labels == ("class 0", "class 1", "class 2")


def test_empty_splits_are_refused_unless_asked_for():
    with pytest.raises(DataError, match=r"validation split is empty: 2 examples are too few for a fraction of 0.1"):
        split_examples(many(2), "time", 0.1, 0.4)
    with pytest.raises(DataError, match=r"train split is empty: 0 examples"):
        split_examples([], "hash", 0.0, 0.0)
    assert len(split_examples(many(2), "hash", 0.0, 0.0).train) == 2


def test_time_split_needs_times():
    with pytest.raises(DataError, match=r"1 of 2 examples have no time: split them by hash"):
        split_examples([example("x", time=1.0), example("y")], "time", 0.1, 0.2)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(20, 200), st.integers(1, 5), st.sampled_from(["iid", "label-skew"]), st.sampled_from([0.3, 5]), st.integers(0, 9)
)
def test_parts_are_disjoint_and_whole(count, parts, scheme, alpha, seed):
    examples = many(count)
    taken = [take_part(examples, i, parts, scheme, alpha, seed) for i in range(parts)]
    assert sorted(e.text for part in taken for e in part) == sorted(e.text for e in examples)
    assert all(part == [e for e in examples if e in set(part)] for part in taken)
    assert take_part(examples, 0, parts, scheme, alpha, seed) == taken[0]
    if scheme == "iid":
        assert max(map(len, taken)) - min(map(len, taken)) <= 1
    assert min(map(len, taken)) >= 1


def test_label_skew_is_uneven_and_less_so_with_a_larger_alpha():
    def spread(alpha: float) -> float:
        parts = [take_part(many(3000), i, 3, "label-skew", alpha, seed=1) for i in range(3)]
        shares = [Counter(e.label for e in part)["class 0"] / 1000 for part in parts]
        return max(shares) - min(shares)

    assert spread(0.1) > 0.4 > 0.2 > spread(100.0)


def test_the_seed_changes_the_parts():
    assert take_part(many(50), 0, 2, "iid", 1.0, seed=0) != take_part(many(50), 0, 2, "iid", 1.0, seed=1)


def test_impossible_divisions_are_refused():
    with pytest.raises(DataError, match=r"2 examples cannot be divided among 3 devices"):
        take_part(many(2), 0, 3, "iid", 1.0, 0)
    with pytest.raises(DataError, match=r"no part 3 of 3"):
        take_part(many(9), 3, 3, "iid", 1.0, 0)
    with pytest.raises(DataError, match=r"alpha 0.001 .* raise partition_alpha"):
        take_part(many(400, classes=1), 0, 20, "label-skew", 0.001, 0)


def test_label_sets_keep_the_order_of_the_logits():
    labels = LabelSet(("b", "a"))
    assert labels.names == ("b", "a") and len(labels) == 2 and labels.index("b") == 0
    with pytest.raises(DataError, match=r"label 'd' is not among those agreed on \(b, a\)"):
        labels.index("d")
    with pytest.raises(DataError, match="not distinct"):
        LabelSet(("b", "a", "b"))
