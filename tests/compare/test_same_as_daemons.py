"""A run in one process is the run of real daemons over gRPC: the same adapters, the same bytes."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np

from sfl.adapters import peft_format
from sfl.cluster.plan import Plan
from sfl.settings import FedSettings, StrategySettings
from sfl.simulated_time import DeviceSpeed
from sfl.simulation import Conditions, simulate
from tests.daemons.processes import Daemons
from tests.daemons.runs import device_settings, edge_settings, several_devices, start_all, stop_servers
from tests.flows import write_texts
from tests.metrics import events, losses_of
from tests.tiny import save_tiny_model

ROUNDS = StrategySettings(name="fedavg", local_steps=3)
# Nothing is adopted before an upload, so devices that are through one after the other do the same however fast they are.
ONE_BY_ONE = StrategySettings(
    name="gsfs", quorum=1.0, pace=1.0, min_steps=30, max_steps=60, validate_every=0, keep_progress=False
)


def uploads_of(folder: Path) -> list[tuple[int, str]]:
    return [(event["step"], event["trigger"]) for event in events(folder, "submit")]


def assert_same_versions(there: Path, here: Path, count: int) -> None:
    for version in range(count):
        expected, found = (peft_format.read(folder / "adapters" / f"v{version}")[0] for folder in (there, here))
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert np.array_equal(found[key], value), f"{key} of version {version} differs"


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
    assert_same_versions(there, here, 4)
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


def test_a_device_that_joined_alone_goes_at_the_pace_of_one_that_joined_with_all(tmp_path: Path) -> None:
    """Nobody trains before both have joined, as the edge server is held, and then one after the other."""
    model, labels = save_tiny_model(tmp_path / "model", "bert"), ("Benign", "C&C", "DDoS")
    many, few = (
        device_settings(name, model, write_texts(tmp_path / f"{name}.txt", size, seed), cut=2, seed=seed, steps=steps)
        for name, size, seed, steps in (("many", 400, 1, 90), ("few", 60, 2, 100))
    )
    edge, there, here = edge_settings("edge", many), tmp_path / "daemons", tmp_path / "here"
    # The one that begins alone has no logit offsets either until the other has come: without them all its steps are the same.
    strategy = ONE_BY_ONE.model_copy(update={"logit_adjustment": 0.0})
    fed = FedSettings(devices=2, strategy=strategy, labels=labels, adapters=there / "adapters")
    with Daemons(there, forked=True) as daemons:
        plan = Plan(there, fed, (edge,), (many, few)).with_addresses()
        daemons.start("fed", plan.fed)
        daemons.start("edge", plan.edges[0])
        for device, held in zip(plan.devices, ("edge", "many")):
            daemons.start("device", device)
            daemons["fed"].until(lambda fed, name=device.name: name in [event["name"] for event in fed.events("join")])
            daemons[held].process.send_signal(signal.SIGSTOP)
        daemons["edge"].process.send_signal(signal.SIGCONT)
        daemons["few"].until(lambda few: few.events("step"))  # from then on it adopts nothing before its upload
        daemons["few"].process.send_signal(signal.SIGSTOP)
        for name in ("many", "few"):
            daemons[name].process.send_signal(signal.SIGCONT)
            assert daemons[name].wait() == 0, daemons[name].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}

    speeds = {"many": DeviceSpeed(0.1), "few": DeviceSpeed(10.0)}
    simulate(fed.model_copy(update={"adapters": None}), [many, few], here, edge, conditions=Conditions(speeds))
    uploads = {name: uploads_of(there / name) for name in ("many", "few")}
    assert uploads["many"][0][0] < 30 and len(uploads["many"]) > 2, "sooner than by the settings"
    assert [step for step, _ in uploads["few"]] == [100], "later than by the settings"
    for name, found in uploads.items():
        assert found == uploads_of(here / name)
        assert losses_of(there / name) == losses_of(here / name)
    assert len(list((here / "adapters").iterdir())) == len(list((there / "adapters").iterdir())) == 3
    assert_same_versions(there, here, 3)
