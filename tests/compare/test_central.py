"""Figures of adapters on the uncut model: those of `sfl eval`, whatever was evaluated before."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfl.adapters import peft_format
from sfl.adapters.state import AdapterState
from sfl.compare.central import Central, by_device, calibration_error, scores, share_taken_for
from sfl.compare.outcome import Scores
from sfl.data.example import Example, content_key
from sfl.errors import DataError
from sfl.evaluate import evaluate
from sfl.settings import FedSettings, StrategySettings
from sfl.simulation import simulate
from tests.daemons.runs import device_settings
from tests.flows import write_texts
from tests.tiny import save_tiny_model

LABELS = ("Benign", "C&C", "DDoS")


def noisy(folder: Path, like: Path, seed: int) -> Path:
    """An adapter in `folder` like the one in `like`, with other values in every tensor."""
    state, layout = peft_format.read(like)
    chance = np.random.default_rng(seed)
    changed: AdapterState = {
        key: value + chance.normal(0, 0.3, value.shape).astype(np.float32) for key, value in sorted(state.items())
    }
    peft_format.write(folder, changed, layout)
    return folder


def test_adapters_in_turn_have_the_figures_that_they_have_alone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    device = device_settings("device", model, write_texts(tmp_path / "texts.txt", 60), steps=1)
    simulate(FedSettings(devices=1, strategy=StrategySettings(name="fedavg", local_steps=1)), [device], tmp_path / "out")
    folders = [noisy(tmp_path / f"v{seed}", tmp_path / "out" / "adapters" / "v0", seed) for seed in range(2)]
    texts = ["proto tcp", "the quick brown fox", "proto tcp", "dog 1 2 3 4 5 6 7 8 9 0 1 2", "http"] * 7
    examples = [Example(text, LABELS[index % 3], None, content_key(text)) for index, text in enumerate(texts)]
    central = Central(str(model), LABELS, device.max_length, batch_size=2)
    tokens = central.texts(examples)
    assert (len(tokens), len(tokens.ids)) == (35, 4)
    found = []
    for folder in (*folders, folders[0]):
        with central.adapted(folder) as adapted:
            logits = adapted.logits(tokens)
            assert adapted.seconds_each(tokens, 5) > 0
        found.append(scores(logits, tokens.labels))
        alone = evaluate(model, folder, examples)
        assert (found[-1].accuracy, found[-1].f1_macro) == (alone.accuracy, alone.f1_macro)
        assert found[-1].loss == pytest.approx(alone.loss, rel=1e-5)
    assert found[0] == found[2] != found[1]
    assert central.too_long(examples) == 0
    with pytest.raises(DataError, match="label 'Torii' is not among those agreed on"):
        central.texts([Example("a b", "Torii", None, "")])


def test_the_scores_of_known_logits() -> None:
    logits = np.log(np.array([[0.8, 0.2], [0.6, 0.4], [0.3, 0.7], [0.9, 0.1]], dtype=np.float32))
    found = scores(logits, np.array([0, 1, 1, 0]))
    assert isinstance(found, Scores) and found.accuracy == 0.75
    assert found.f1_macro == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert found.loss == pytest.approx(-np.log([0.8, 0.4, 0.7, 0.9]).mean(), rel=1e-6)
    assert found.calibration_error == pytest.approx((0.2 + 0.6 + 0.3 + 0.1) / 4, rel=1e-5)  # each in a bin of its own
    assert share_taken_for(logits, 1) == 0.25
    example = Example("", None, None, "")
    assert by_device(np.array([0, 1, 1, 0]), logits, {"a": [example], "b": [example] * 3}) == {"a": 1.0, "b": 2 / 3}


def test_a_bin_compares_the_mean_confidence_with_the_accuracy() -> None:
    right = np.array([True, False, True, True])
    assert calibration_error(np.array([0.91, 0.93, 1.0, 0.94]), right, bins=1) == pytest.approx(abs(0.75 - 0.945))
    assert calibration_error(np.array([0.5, 0.5, 1.0, 1.0]), right, bins=2) == pytest.approx(0.0)
    assert calibration_error(np.array([0.5, 0.51]), np.array([True, False]), bins=2) == pytest.approx(0.505)
