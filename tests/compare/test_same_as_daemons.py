"""A run in one process is the run of real daemons over gRPC: the same adapters, the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sfl.adapters import peft_format
from sfl.settings import FedSettings, StrategySettings
from sfl.simulation import simulate
from tests.daemons.processes import Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all, stop_servers
from tests.metrics import losses_of
from tests.tiny import save_tiny_model

ROUNDS = StrategySettings(name="fedavg", local_steps=3)


def test_adapters_and_bytes_are_those_of_daemons(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    devices = several_devices(tmp_path, model, [1, 3], steps=8)
    edge = edge_settings("edge", devices[0])
    there = tmp_path / "daemons"
    with Daemons(there, forked=True) as daemons:
        start_all(daemons, ROUNDS, [edge], devices)
        for device in devices:
            assert daemons[device.name].wait() == 0, daemons[device.name].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
        ends = {name: daemons[name].events("end")[0] for name in ("fed", "edge", *(device.name for device in devices))}

    here = tmp_path / "here"
    simulated = simulate(FedSettings(devices=2, strategy=ROUNDS), devices, here, edge)
    assert simulated.federation.version == ends["fed"]["version"] == 3
    for version in range(4):
        expected, found = (peft_format.read(folder / "adapters" / f"v{version}")[0] for folder in (there, here))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert np.array_equal(found[key], value), f"{key} of version {version} differs"
    for device in devices:
        assert losses_of(there / device.name) == losses_of(here / device.name)
        own = simulated.device_traffic[device.name]
        assert sum(traffic.sent for traffic in own) == ends[device.name]["bytes_sent"]
        assert sum(traffic.received for traffic in own) == ends[device.name]["bytes_received"]
    assert simulated.fed_traffic.received == ends["fed"]["bytes_received"]
    assert simulated.fed_traffic.sent == ends["fed"]["bytes_sent"]
    between = simulated.edge_traffic.received + simulated.edge_traffic.sent
    with_fed = simulated.fed_traffic.received + simulated.fed_traffic.sent
    of_devices = sum(traffic.sent + traffic.received for _, traffic in simulated.device_traffic.values())
    assert between + with_fed - of_devices == ends["edge"]["bytes_received"] + ends["edge"]["bytes_sent"]
