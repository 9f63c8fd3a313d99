"""Train, validation and test, so that no content is in two of them."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfl.data.example import Example
from sfl.errors import DataError, TooFewExamplesError

_SALT = "sfl split 1:"


@dataclass(frozen=True)
class Splits:
    """A device's examples, each list in file order (by time if they were split by time).

    `columns` is what their texts were made of: see `sfl.data.read.Read`.
    """

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    columns: tuple[str, ...] = ()

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes seen in any of the three, sorted."""
        return tuple(sorted({example.label for example in (*self.train, *self.validation, *self.test) if example.label}))

    @property
    def label_counts(self) -> tuple[int, ...]:
        """Training examples with each of `labels`."""
        counts = Counter(example.label for example in self.train)
        return tuple(counts[label] for label in self.labels)


def drop_repeats(examples: Sequence[Example]) -> list[Example]:
    """The first example of each (content, label), in order."""
    firsts: dict[tuple[str, str | None], Example] = {}
    for example in examples:
        firsts.setdefault((example.key, example.label), example)
    return list(firsts.values())


def split_examples(examples: Sequence[Example], by: Literal["hash", "time"], validation: float, test: float) -> Splits:
    """Divide into fractions `test`, `validation` and the rest for training.

    By hash, a number in [0, 1) is made of each content key, the same on every device: examples of equal content fall together,
    and the fractions hold on average. By time, the earliest are trained on, the latest tested, and the fractions are exact; with
    repeats kept, the future then holds content that the past held too. Nothing is drawn by chance. Raises `DataError` when a
    split that was asked for comes out empty, and for a split by time of examples without one.
    """
    splits = _by_time(examples, validation, test) if by == "time" else _by_hash(examples, validation, test)
    wanted = {
        "train": (splits.train, 1 - validation - test),
        "validation": (splits.validation, validation),
        "test": (splits.test, test),
    }
    for name, (part, fraction) in wanted.items():
        if fraction > 0 and not part:
            raise TooFewExamplesError(
                f"the {name} split is empty: {len(examples)} examples are too few for a fraction of {fraction:g}; "
                "bring more examples, or set that fraction to 0"
            )
    return splits


def _by_hash(examples: Sequence[Example], validation: float, test: float) -> Splits:
    splits = Splits([], [], [])
    for example in examples:
        place = _unit(example.key)
        part = splits.test if place < test else splits.validation if place < test + validation else splits.train
        part.append(example)
    return splits


def _by_time(examples: Sequence[Example], validation: float, test: float) -> Splits:
    times = [example.time for example in examples]
    if None in times:
        raise DataError(f"{times.count(None)} of {len(times)} examples have no time: split them by hash")
    ordered = sorted(examples, key=lambda example: example.time or 0.0)
    for_test, for_validation = round(len(ordered) * test), round(len(ordered) * validation)
    train_end = len(ordered) - for_test - for_validation
    return Splits(ordered[:train_end], ordered[train_end : train_end + for_validation], ordered[train_end + for_validation :])


def _unit(key: str) -> float:
    """A number in [0, 1) that depends on `key` alone."""
    return int.from_bytes(hashlib.sha256((_SALT + key).encode()).digest()[:6], "big") / 2**48
