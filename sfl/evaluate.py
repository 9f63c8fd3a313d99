"""An adapter on the uncut model: how good is what was learnt, with PEFT alone and no server."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel

from sfl.adapters import peft_format
from sfl.adapters.layout import AdapterLayout
from sfl.data.batches import eval_batches, tokenise
from sfl.data.example import Example
from sfl.data.labels import LabelSet
from sfl.data.load import load_splits
from sfl.data.read import read_examples, with_columns
from sfl.data.settings import DataSettings, Task
from sfl.data.split import drop_repeats
from sfl.errors import AdapterError, DataError, ModelError, TooFewExamplesError
from sfl.model.fingerprint import model_fingerprint
from sfl.model.load import load_task_model, load_tokenizer
from sfl.model.metrics import accuracy, f1_by_class, macro_f1
from sfl.model.tasks import make_labels, score


@dataclass(frozen=True)
class ClassResult:
    """One class: the number of examples that have it, and its F1 (0 to 1)."""

    label: str
    count: int
    f1: float


@dataclass(frozen=True)
class Result:
    """`loss` is the mean over `count` examples (a causal LM: predicted tokens), in nats.

    `accuracy`, `f1_macro` (0 to 1) and `classes` are None for a causal LM.
    """

    loss: float
    count: int
    accuracy: float | None = None
    f1_macro: float | None = None
    classes: tuple[ClassResult, ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)


def evaluate(
    model: str | Path,
    adapter: Path,
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
) -> Result:
    """Loss, accuracy and macro-F1 of `model` with the PEFT adapter in the folder `adapter`, on `examples`, in fp32.

    Labels and the length that texts are cut to are those of the adapter's `sfl.json`.
    Raises `AdapterError` for a folder that is no adapter of ours, `ModelError` for another base model than the adapter's,
    `DataError` for no examples or a label that the adapter does not know.
    """
    _, layout = peft_format.read(adapter)  # also finds a damaged file before anything large is loaded
    task = _task(layout)
    require_known(examples, layout)
    require_base(model, layout)
    labels = LabelSet(layout.labels) if task == "classification" else None
    encoded = tokenise(examples, load_tokenizer(model), layout.max_length, labels)
    base = load_task_model(model, task, layout.labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what peft and transformers tell each other
        whole = PeftModel.from_pretrained(base, str(adapter)).eval()
    loss_sum, count = 0.0, 0
    predicted: list[int] = []
    with torch.inference_mode():
        for batch in eval_batches(encoded, batch_size):
            ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
            truth = make_labels(task, ids, mask, None if batch.labels is None else torch.from_numpy(batch.labels))
            output = whole(input_ids=ids, attention_mask=mask, labels=truth)
            part = score(task, output.loss, output.logits, truth)
            loss_sum, count = loss_sum + part.loss_sum, count + part.count
            if part.predictions is not None:
                predicted += part.predictions.tolist()
    if encoded.labels is None:
        return Result(loss_sum / count, count)
    guesses = np.array(predicted, dtype=np.int64)
    f1 = f1_by_class(encoded.labels, guesses)
    counts = np.bincount(encoded.labels, minlength=len(layout.labels))
    return Result(
        loss_sum / count,
        count,
        accuracy(encoded.labels, guesses),
        macro_f1(encoded.labels, guesses),
        tuple(ClassResult(name, int(counts[index]), f1.get(index, 0.0)) for index, name in enumerate(layout.labels)),
    )


def examples_for(layout: AdapterLayout, data: Sequence[DataSettings], split: Literal["all", "test"] = "all") -> list[Example]:
    """The examples of these files as the adapter's training made them: its columns, repeats dropped where `data` says so.

    `test` takes the part that `data` sets aside for the test: nothing that was trained on only where the device had the same
    file and split settings. Raises `DataError` for what cannot be read.
    """
    task = _task(layout)
    found: list[Example] = []
    for each in data:
        settings = with_columns(each, layout.columns)
        if split == "test":
            found += load_splits(settings, task).test
        else:
            read = read_examples(settings.path, settings, task)
            found += drop_repeats(read) if settings.drop_repeats else read
    return found


def require_known(examples: Sequence[Example], layout: AdapterLayout) -> None:
    """Raise `DataError` when there is nothing to evaluate, or for a label that the adapter was not trained on."""
    if not examples:
        raise TooFewExamplesError("there are no examples to evaluate on")
    if layout.task != "classification":
        return
    unknown = {example.label for example in examples} - set(layout.labels)
    if unknown:
        count = sum(example.label in unknown for example in examples)
        names = ", ".join(sorted(f"'{label}'" for label in unknown))
        raise DataError(
            f"{count} of {len(examples)} examples have a label that the adapter was not trained on: {names}; it knows "
            f"{', '.join(layout.labels)}. Leave them out (sfl eval --skip-unknown), or train with these labels"
        )


def require_base(model: str | Path, layout: AdapterLayout) -> None:
    """Raise `ModelError` unless `model` has the weights that the adapter was trained on."""
    found = model_fingerprint(model)
    if found != layout.model_fingerprint:
        raise ModelError(
            f"'{model}' is not the model that the adapter was trained on: its weights' fingerprint is {found[:12]}, not "
            f"{layout.model_fingerprint[:12]}; take '{layout.base_model}'"
        )


def _task(layout: AdapterLayout) -> Task:
    if layout.task == "classification":
        return "classification"
    if layout.task == "causal-lm":
        return "causal-lm"
    raise AdapterError(f"the adapter was trained for the unknown task '{layout.task}'")
