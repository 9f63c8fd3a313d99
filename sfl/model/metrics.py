"""Accuracy and macro-F1 of a classification, from the truth and the predictions."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sfl.errors import DataError

Indices = npt.NDArray[np.int64]


def accuracy(truth: Indices, predicted: Indices) -> float:
    """Share of texts (0 to 1) whose class was predicted. Raises `DataError` where there are none."""
    _require_pairs(truth, predicted)
    return float(np.mean(truth == predicted))


def f1_by_class(truth: Indices, predicted: Indices) -> dict[int, float]:
    """F1 = 2 TP / (2 TP + FP + FN) of each class that occurs in truth or prediction, by class index."""
    _require_pairs(truth, predicted)
    scores = {}
    for label in np.union1d(truth, predicted):
        true, found = truth == label, predicted == label
        scores[int(label)] = float(2 * np.sum(true & found) / (np.sum(true) + np.sum(found)))  # TP+FN and TP+FP
    return scores


def macro_f1(truth: Indices, predicted: Indices) -> float:
    """Mean of `f1_by_class`, each class counted once."""
    return float(np.mean(list(f1_by_class(truth, predicted).values())))


def _require_pairs(truth: Indices, predicted: Indices) -> None:
    if len(truth) == 0 or truth.shape != predicted.shape:
        raise DataError(f"cannot score {len(predicted)} predictions against {len(truth)} true classes")
