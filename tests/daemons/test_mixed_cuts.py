"""Devices of different cuts, precisions and micro-batches at one edge: each learns what it would learn alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sfl.settings import FedSettings, StrategySettings
from sfl.simulation import simulate
from tests.daemons.processes import Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all, stop_servers
from tests.metrics import losses_of
from tests.tiny import save_tiny_model

STEPS = 12
APART = StrategySettings(name="fedavg", local_steps=STEPS)  # the only round ends with the run
LABELS = ("Benign", "C&C", "DDoS")


def test_each_device_has_the_numbers_that_it_has_alone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "opt")
    plain = several_devices(tmp_path, model, [1, 2, 3, 2, 3], steps=STEPS)
    changes = [{}, {}, {}, {"precision": "bf16"}, {"micro_batch": 1, "checkpointing": True}]
    devices = tuple(device.model_copy(update=change) for device, change in zip(plain, changes))
    edge = edge_settings("edge", devices[0])
    with Daemons(tmp_path / "together", forked=True) as daemons:
        start_all(daemons, APART, [edge], devices, labels=LABELS)
        for device in devices:
            assert daemons[device.name].wait() == 0, daemons[device.name].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
    for device in devices:
        alone = tmp_path / "alone" / device.name
        simulate(FedSettings(devices=1, strategy=APART, labels=LABELS), [device], alone, edge)
        together = losses_of(tmp_path / "together" / device.name)
        assert len(together) == STEPS
        np.testing.assert_allclose(together, losses_of(alone / device.name), rtol=1e-5, err_msg=device.name)
