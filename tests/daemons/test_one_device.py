"""One device over real gRPC between processes: what it learns is what the unsplit PEFT model learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfl.adapters import peft_format
from sfl.settings import DeviceSettings, OptimizerSettings, StrategySettings
from tests.daemons.processes import Daemons
from tests.daemons.runs import device_settings, edge_settings, start_all, stop_servers
from tests.flows import write_texts
from tests.metrics import losses_of
from tests.tiny import save_tiny_model
from tests.unsplit import read_trained, train_unsplit

STEPS = 20


def run(folder: Path, device: DeviceSettings) -> dict[str, int]:
    """One round of FedAvg, so that the device's adapter is the published one; the daemons' exit codes."""
    with Daemons(folder, forked=True) as daemons:
        start_all(daemons, StrategySettings(name="fedavg", local_steps=STEPS), [edge_settings("edge", device)], [device])
        code = daemons["device-1"].wait()
        assert code == 0, daemons["device-1"].log
        return {"device-1": code, **stop_servers(daemons)}


@pytest.mark.parametrize(
    ("family", "task", "cut", "optimizer"),
    [
        ("bert", "classification", 1, "adamw"),
        ("opt", "causal-lm", 2, "sgd"),
        ("llama", "classification", 3, "adamw"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("bert", "classification", 3, "sgd"),
                ("opt", "classification", 1, "adamw"),
                ("llama", "causal-lm", 2, "sgd"),
            ]
        ),
    ],
)
def test_twenty_steps_are_those_of_peft(tmp_path: Path, family: str, task: str, cut: int, optimizer: str) -> None:
    device = device_settings(
        "device-1",
        save_tiny_model(tmp_path / "model", family),
        write_texts(tmp_path / "texts.txt", 120),
        task=task,
        cut=cut,
        steps=STEPS,
        optimizer=OptimizerSettings(name=optimizer, learning_rate=0.05 if optimizer == "sgd" else 2e-3),
    )
    folder = tmp_path / "run"
    assert run(folder, device) == {"device-1": 0, "edge": 0, "fed": 0}
    versions = folder / "adapters"
    assert sorted(path.name for path in versions.iterdir()) == ["v0", "v1"]

    version_0, layout = peft_format.read(versions / "v0")
    losses, model = train_unsplit(device, layout.labels, versions / "v0")
    assert len(losses) == STEPS and losses[-1] < losses[0]
    np.testing.assert_allclose(losses_of(folder / "device-1"), losses, rtol=1e-5)
    np.testing.assert_allclose(losses_of(folder / "edge"), losses, rtol=1e-5)

    reference = read_trained(model, versions / "v1", tmp_path / "reference")
    final, _ = peft_format.read(versions / "v1")
    assert final.keys() == reference.keys()
    assert max(float(np.abs(reference[key] - version_0[key]).max()) for key in reference) > 1e-3
    for key, value in reference.items():
        np.testing.assert_allclose(final[key], value, rtol=1e-5, atol=1e-7, err_msg=str(key))
