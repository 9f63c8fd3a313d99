"""Adapters on the uncut model: the base is loaded once, adapters are put on it in turn as PEFT loads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel

from sfl.compare.outcome import Scores
from sfl.data.batches import Batch, Encoded, tokenise
from sfl.data.example import Example
from sfl.data.labels import LabelSet
from sfl.errors import TooFewExamplesError
from sfl.model.load import load_task_model, load_tokenizer
from sfl.model.metrics import accuracy, macro_f1
from sfl.settings import RunOn

BINS = 15  # of confidence, in the calibration error
_WARM_UP = 3  # texts before those that are timed

Logits = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class Texts:
    """Examples as tokens. Equal ones are computed once, in batches of like length."""

    def __init__(self, encoded: Encoded) -> None:
        if encoded.labels is None or not len(encoded):
            raise TooFewExamplesError("there are no labelled examples to evaluate on")
        self.labels: Indices = encoded.labels
        distinct: dict[bytes, int] = {}
        self.place = np.array([distinct.setdefault(ids.tobytes(), len(distinct)) for ids in encoded.input_ids])
        self.ids = [np.frombuffer(ids, dtype=np.int64) for ids in distinct]
        self.pad_id = encoded.pad_id

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: int) -> Batch:
        """One example by itself."""
        ids = self.ids[self.place[index]][None, :].copy()
        return Batch(ids, np.ones_like(ids), self.labels[index : index + 1])


class Central:
    """The uncut fp32 base, on which adapters are evaluated. `labels` are the classes in the order of the logits."""

    def __init__(self, model: str, labels: Sequence[str], max_length: int, run_on: RunOn = "cpu", batch_size: int = 64) -> None:
        self.tokenizer = load_tokenizer(model)
        self._labels = LabelSet(tuple(labels))
        self._max_length = max_length
        self._base: Any = load_task_model(model, "classification", labels).to(run_on)  # type: ignore[arg-type]
        self._place = torch.device(run_on)
        self._batch_size = batch_size

    def texts(self, examples: Sequence[Example]) -> Texts:
        """Raises `DataError` for no examples or an unknown label."""
        return Texts(tokenise(examples, self.tokenizer, self._max_length, self._labels))

    def too_long(self, examples: Sequence[Example]) -> int:
        """How many of them lose their end to `max_length`."""
        whole = self.tokenizer([example.text for example in examples], verbose=False)["input_ids"]
        return sum(len(ids) > self._max_length for ids in whole)

    @contextmanager
    def adapted(self, adapter: Path) -> Iterator[Adapted]:
        """The base with the PEFT adapter in this folder; one at a time."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft and transformers tell each other
            whole = PeftModel.from_pretrained(self._base, str(adapter)).eval()
        try:
            yield Adapted(whole, self._place, self._batch_size)
        finally:
            self._base = whole.unload()
            if hasattr(self._base, "peft_config"):
                del self._base.peft_config  # or the next adapter would be taken for a second one


class Adapted:
    """The base with one adapter, in eval mode."""

    def __init__(self, model: Any, place: torch.device, batch_size: int) -> None:
        self._model = model
        self._place = place
        self._batch_size = batch_size

    def logits(self, texts: Texts) -> Logits:
        """(examples, classes), float32."""
        order = sorted(range(len(texts.ids)), key=lambda index: len(texts.ids[index]))
        rows: dict[int, Logits] = {}
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            rows.update(zip(chosen, self._forward([texts.ids[index] for index in chosen], texts.pad_id)))
        found: Logits = np.stack([rows[index] for index in range(len(order))])[texts.place]
        return found

    def seconds_each(self, texts: Texts, count: int) -> float:
        """The mean time of classifying one text alone, over `count` texts evenly spaced over the set."""
        count = min(count, len(texts))
        chosen = [texts.ids[texts.place[index * len(texts) // count]] for index in range(count)]
        for ids in chosen[:_WARM_UP]:
            self._forward([ids], texts.pad_id)
        started = perf_counter()
        for ids in chosen:
            self._forward([ids], texts.pad_id)
        return (perf_counter() - started) / count

    @torch.inference_mode()
    def _forward(self, rows: Sequence[Indices], pad_id: int) -> Logits:
        width = max(len(ids) for ids in rows)
        ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        logits = self._model(input_ids=ids.to(self._place), attention_mask=mask.to(self._place)).logits
        found: Logits = logits.float().cpu().numpy()
        return found


def scores(logits: Logits, truth: Indices) -> Scores:
    """Accuracy, macro-F1, mean cross-entropy and expected calibration error of (examples, classes) logits."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    guesses = logits.argmax(axis=1)
    return Scores(
        accuracy(truth, guesses),
        macro_f1(truth, guesses),
        float(-logs[np.arange(len(truth)), truth].mean()),
        calibration_error(np.exp(logs.max(axis=1)), guesses == truth),
    )


def calibration_error(confidence: npt.NDArray[np.float64], right: npt.NDArray[np.bool_], bins: int = BINS) -> float:
    """Expected calibration error (Guo et al. 2017): sum over bins b of n_b/n |accuracy_b - confidence_b|.

    The bins divide (0, 1] into equal parts; `confidence` is the greatest probability of each example.
    """
    place = np.clip(np.ceil(confidence * bins).astype(np.int64) - 1, 0, bins - 1)
    gap = np.bincount(place, right, bins) - np.bincount(place, confidence, bins)
    return float(np.abs(gap).sum() / len(confidence))


def share_taken_for(logits: Logits, label: int) -> float:
    """The share of examples whose predicted class is `label`."""
    return float(np.mean(logits.argmax(axis=1) == label))


def by_device(truth: Indices, logits: Logits, tests: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """Accuracy on each device's part of the pooled examples, which are in the order of the devices."""
    right, start, found = logits.argmax(axis=1) == truth, 0, {}
    for name, examples in tests.items():
        found[name] = float(right[start : start + len(examples)].mean())
        start += len(examples)
    return found
