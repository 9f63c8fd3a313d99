"""The device trainer and the edge engine together are the unsplit PEFT model: the same losses, the same adapter, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfl.adapters import peft_format
from sfl.data.settings import DataSettings
from sfl.settings import DeviceSettings, FedSettings, LoraSettings, OptimizerSettings, StrategySettings
from sfl.simulation import simulate
from tests.flows import write_texts
from tests.metrics import losses_of
from tests.tiny import save_tiny_model
from tests.unsplit import read_trained, train_unsplit

STEPS = 20


def one_device(folder: Path, family: str, task: str, optimizer: str, schedule: str, cut: int) -> DeviceSettings:
    model = save_tiny_model(folder / "model", family)
    return DeviceSettings(
        name="device-1",
        model=str(model),
        task=task,
        lora=LoraSettings(rank=4, alpha=8),
        cut=cut,
        data=DataSettings(path=write_texts(folder / "texts.txt", 120)),
        batch_size=4,
        max_length=48,
        steps=STEPS,
        optimizer=OptimizerSettings(name=optimizer, learning_rate=0.05 if optimizer == "sgd" else 2e-3, schedule=schedule),
    )


@pytest.mark.parametrize(("optimizer", "schedule"), [("sgd", "constant"), ("adamw", "constant"), ("adamw", "linear")])
@pytest.mark.parametrize(
    ("family", "task", "cut"),
    [
        ("opt", "classification", 2),
        ("opt", "causal-lm", 1),
        ("llama", "classification", 3),
        ("llama", "causal-lm", 2),
        ("bert", "classification", 1),
    ],
)
def test_twenty_steps_are_those_of_peft(tmp_path: Path, family: str, task: str, cut: int, optimizer: str, schedule: str) -> None:
    settings = one_device(tmp_path, family, task, optimizer, schedule, cut)
    fed = FedSettings(devices=1, strategy=StrategySettings(name="fedavg", local_steps=STEPS))
    out = tmp_path / "out"
    simulated = simulate(fed, [settings], out)
    version_0, layout = peft_format.read(out / "adapters" / "v0")
    assert simulated.federation.version == 1

    losses, model = train_unsplit(settings, layout.labels, out / "adapters" / "v0")
    assert losses_of(out / "device-1") == losses
    assert losses[-1] < losses[0]

    reference = read_trained(model, out / "adapters" / "v1", tmp_path / "reference")
    final, _ = peft_format.read(out / "adapters" / "v1")
    assert simulated.local["device-1"].keys() == reference.keys() == final.keys()
    assert max(float(np.abs(reference[key] - version_0[key]).max()) for key in reference) > 1e-3
    for key, value in reference.items():
        assert np.array_equal(simulated.local["device-1"][key], value), f"{key} differs"
        np.testing.assert_allclose(final[key], value, rtol=1e-6, atol=1e-7)  # v0 + (trained - v0) rounds once
