"""Labels, what an evaluation adds up, and its figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sfl.errors import DataError, ModelError, WireError
from sfl.model.metrics import accuracy, macro_f1
from sfl.model.tasks import Score, adjusted_loss, make_labels, score
from tests.tiny import tiny_batch, tiny_config, tiny_model


def test_labels() -> None:
    ids, mask = torch.tensor([[5, 6, 0], [7, 0, 0]]), torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert make_labels("causal-lm", ids, mask, None).tolist() == [[5, 6, -100], [7, -100, -100]]
    assert make_labels("classification", ids, mask, torch.tensor([1, 0], dtype=torch.int32)).dtype == torch.int64
    for classes in (None, torch.tensor([1])):
        with pytest.raises(ModelError, match="2 texts"):
            make_labels("classification", ids, mask, classes)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_scores_of_parts_add_up_to_the_whole(task: str) -> None:
    config = tiny_config("llama")
    model = tiny_model(config, task)
    ids, mask = tiny_batch(config, batch=6)
    labels = make_labels(task, ids, mask, ids[:, 0] % 3)

    def scored(rows: slice) -> tuple[float, int]:
        with torch.no_grad():
            output = model(input_ids=ids[rows], attention_mask=mask[rows], labels=labels[rows])
        result = score(task, output.loss, output.logits, labels[rows])
        assert (result.predictions is None) == (task == "causal-lm")
        return result.loss_sum, result.count

    whole, parts = scored(slice(0, 6)), [scored(slice(0, 2)), scored(slice(2, 6))]
    assert whole[1] == sum(part[1] for part in parts) == (6 if task == "classification" else int(mask[:, 1:].sum()))
    assert whole[0] == pytest.approx(sum(part[0] for part in parts), rel=1e-5)


def test_a_batch_without_predicted_tokens_adds_nothing() -> None:
    labels = torch.tensor([[5, -100]])
    assert score("causal-lm", torch.tensor(float("nan")), torch.zeros(1, 2, 8), labels) == Score(0.0, 0, None)


def test_metrics() -> None:
    truth, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 3, 3])
    # class 0: precision 1, recall 2/3; 1: 1/2, 1/2; 2 is never found; 3 never true
    assert macro_f1(truth, predicted) == pytest.approx((0.8 + 0.5 + 0 + 0) / 4)
    assert accuracy(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])) == 0.75
    assert macro_f1(np.array([0, 0, 2]), np.array([0, 0, 0])) == pytest.approx((0.8 + 0) / 2)
    for figure in (accuracy, macro_f1):
        with pytest.raises(DataError):
            figure(np.array([], dtype=np.int64), np.array([], dtype=np.int64))


def test_the_offsets_are_added_to_the_logits() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    plain = torch.nn.functional.cross_entropy(logits, labels)
    assert adjusted_loss("classification", logits, labels, (5.0, 5.0, 5.0)).item() == pytest.approx(plain.item(), rel=1e-5)
    shifted = logits + torch.tensor([0.0, -3.0, 1.0])
    expected = -torch.log_softmax(shifted, -1)[range(4), labels].mean()
    assert adjusted_loss("classification", logits, labels, (0.0, -3.0, 1.0)).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("task, offsets", [("classification", (0.0, 1.0)), ("causal-lm", (0.0, 1.0, 2.0))])
def test_offsets_of_no_classes_are_refused(task: str, offsets: tuple[float, ...]) -> None:
    with pytest.raises(WireError, match="offsets of the logits came"):
        adjusted_loss(task, torch.randn(4, 3), torch.tensor([0, 2, 1, 1]), offsets)
