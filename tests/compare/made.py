"""What the tests of a comparison share: outcomes made by hand, and a small comparison on texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfl.compare.outcome import DeviceOutcome, Outcome, Point, Scores
from sfl.compare.settings import CompareSettings
from tests.flows import write_texts
from tests.tiny import save_tiny_model


def outcome(accuracy: float = 0.9, **changes: Any) -> Outcome:
    """A finished run of two devices with 10 and 30 test examples, the second one an attacker if `attacked`."""
    attacked = changes.pop("attacked", False)
    values: dict[str, Any] = {
        "central": Scores(accuracy, accuracy / 2, 1 - accuracy, 0.1),
        "devices": (
            DeviceOutcome("a", 1, 8, False, 40, 10, 3, Scores(0.5, 0.5, 1.0), 0.6),
            DeviceOutcome("b", 2, 8, attacked, 120, 30, 3, Scores(0.9, 0.7, 0.5), 0.8),
        ),
        "curve": (
            Point(0, 0, 0, 0, 0.0, 0.0, Scores(0.1, 0.1, 2.0)),
            Point(4, 20, 10_000_000, 5_000_000, 2.0, 3.0, Scores(accuracy, accuracy / 2, 1 - accuracy)),
        ),
        "versions": 4,
        "steps": 20,
        "latency_s": 0.01,
        "wall_s": 5.0,
        "simulated_s": 2.0,
        "strategy": "fedavg",
        "labels": ("x", "y"),
        "train": 160,
        "test": 40,
        "submissions": 6,
        "fed_received": 10_000_000,
        "fed_sent": 5_000_000,
        "edge_received": 2_000_000,
        "edge_sent": 1_000_000,
        "split_latency_s": 0.02,
    }
    return Outcome(**{**values, **changes})


def settings(folder: Path, **changes: Any) -> CompareSettings:
    """Three files as three devices, a tiny model, short runs."""
    if not (folder / "data").exists():
        for number in range(3):
            write_texts(folder / "data" / f"texts-{number}.txt", 60 + 20 * number, seed=number)
    values: dict[str, Any] = {
        "data": folder / "data",
        "model": str(save_tiny_model(folder / "model", "bert")),
        "lora": {"rank": 2, "alpha": 4},
        "max_length": 24,
        "steps": 6,
        "batch_size": 4,
        "optimizer": {"learning_rate": 5e-3},
        "seeds": 1,
        "curve_points": 3,
        "latency_texts": 3,
        "fed": {"keep_versions": 1, "strategy": {"local_steps": 3, "min_steps": 2, "validate_every": 3}},  # it keeps all
        "out": folder / "out",
    }
    return CompareSettings.model_validate({**values, **changes})
