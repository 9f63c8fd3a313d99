"""Whole federations in one process: the cut changes nothing, a seed decides everything."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfl.adapters import peft_format
from sfl.adapters.state import AdapterState
from sfl.data.load import load_splits
from sfl.data.settings import DataSettings
from sfl.errors import SettingsError, SflError
from sfl.settings import DeviceSettings, FedSettings, LoraSettings, OptimizerSettings, StrategySettings
from sfl.simulated_time import DeviceSpeed
from sfl.simulation import Conditions, LoadedHalves, Simulated, simulate
from sfl.telemetry import MetricsWriter
from sfl.v1.federation_pb2 import DEVICE, UpdateHeader
from tests.flows import write_texts
from tests.metrics import events, losses_of
from tests.tiny import save_tiny_model


def devices(folder: Path, model: Path, cuts: list[int], seed: int = 0, dropout: float = 0.0) -> list[DeviceSettings]:
    return [
        DeviceSettings(
            name=f"device-{number}",
            model=str(model),
            lora=LoraSettings(rank=2, alpha=4, dropout=dropout),
            cut=cut,
            data=DataSettings(path=write_texts(folder / f"texts-{number}.txt", 60 + 20 * number, seed=number)),
            batch_size=4,
            max_length=24,
            steps=9,
            optimizer=OptimizerSettings(learning_rate=5e-3),
            seed=seed,
        )
        for number, cut in enumerate(cuts)
    ]


def run(folder: Path, out: str, settings: list[DeviceSettings], strategy: str = "fedavg", **more: Any) -> Simulated:
    chosen = StrategySettings(name=strategy, local_steps=3, min_steps=2, validate_every=3)
    return simulate(FedSettings(devices=len(settings), strategy=chosen), settings, folder / out, **more)


def newest(folder: Path, out: str, version: int) -> AdapterState:
    return peft_format.read(folder / out / "adapters" / f"v{version}")[0]


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_mix_of_cuts_gives_the_adapter_of_equal_cuts(tmp_path: Path, family: str) -> None:
    model = save_tiny_model(tmp_path / "model", family)
    mixed = run(tmp_path, "mixed", devices(tmp_path, model, [1, 2, 3]))
    equal = run(tmp_path, "equal", devices(tmp_path, model, [2, 2, 2]))
    assert mixed.federation.version == equal.federation.version == 3
    first, last = newest(tmp_path, "equal", 0), newest(tmp_path, "equal", 3)
    for version in range(4):
        expected, found = newest(tmp_path, "equal", version), newest(tmp_path, "mixed", version)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert np.linalg.norm(found[key] - value) <= 1e-5 * np.linalg.norm(value), f"{key} in version {version}"
    assert max(float(np.abs(last[key] - first[key]).max()) for key in last) > 1e-3
    for number in range(3):
        np.testing.assert_allclose(
            losses_of(tmp_path / "mixed" / f"device-{number}"), losses_of(tmp_path / "equal" / f"device-{number}"), rtol=1e-5
        )


@pytest.mark.parametrize("strategy", ["fedavg", "gsfs"])
def test_a_seed_decides_everything_dropout_too(tmp_path: Path, strategy: str) -> None:
    model = save_tiny_model(tmp_path / "model", "bert", hidden_dropout_prob=0.2)
    losses = []
    for out, seed, elsewhere in (("first", 3, 1), ("second", 3, 2), ("third", 4, 1)):
        torch.manual_seed(elsewhere)  # what came before in this process must not matter
        run(tmp_path, out, devices(tmp_path, model, [1, 3], seed, dropout=0.3), strategy)
        losses.append([losses_of(tmp_path / out / f"device-{number}") for number in range(2)])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    version = max(event["version"] for event in events(tmp_path / "first" / "fed", "aggregate"))
    one, two = newest(tmp_path, "first", version), newest(tmp_path, "second", version)
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_a_device_draws_its_dropout_as_if_it_were_alone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    settings = devices(tmp_path, model, [2, 1], dropout=0.4)
    both = FedSettings(devices=2, strategy=StrategySettings(local_steps=100, name="fedavg"), labels=("Benign", "C&C", "DDoS"))
    simulate(both, settings, tmp_path / "both")
    simulate(both.model_copy(update={"devices": 1}), settings[:1], tmp_path / "alone")
    assert losses_of(tmp_path / "both" / "device-0") == losses_of(tmp_path / "alone" / "device-0")


@pytest.mark.parametrize("labels", [(), ("Benign", "C&C", "DDoS")])
def test_too_few_devices(tmp_path: Path, labels: tuple[str, ...]) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    with pytest.raises(SettingsError, match="2 devices are expected, 1 take part"):
        simulate(FedSettings(devices=2, labels=labels), devices(tmp_path, model, [1]), tmp_path / "out")


def test_no_file_stays_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[MetricsWriter] = []

    class Noted(MetricsWriter):
        def __init__(self, path: Path | None) -> None:
            super().__init__(path)
            opened.append(self)

    monkeypatch.setattr("sfl.simulation.MetricsWriter", Noted)
    run(tmp_path, "out", devices(tmp_path, save_tiny_model(tmp_path / "model", "bert"), [1, 2]))
    assert len(opened) == 3
    assert all(writer._file is None for writer in opened)


def test_halves_that_are_loaded_once_train_as_fresh_ones(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert", hidden_dropout_prob=0.2)
    halves = LoadedHalves()
    run(tmp_path, "before", devices(tmp_path, model, [2, 1]), halves=halves)
    for seed in (0, 1):
        settings = devices(tmp_path, model, [2, 2, 1], seed)
        shared = run(tmp_path, f"shared-{seed}", settings, "gsfs", halves=halves)
        fresh = run(tmp_path, f"fresh-{seed}", settings, "gsfs")
        assert shared.federation.version == fresh.federation.version
        for name, values in fresh.local.items():
            assert all(np.array_equal(shared.local[name][key], value) for key, value in values.items())


def test_a_round_ends_with_the_slowest_device_and_its_link(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    speeds = {"device-0": DeviceSpeed(0.1), "device-1": DeviceSpeed(0.5, bytes_per_s=1e4, round_trip_s=2.0)}
    found = run(tmp_path, "out", devices(tmp_path, model, [1, 2]), conditions=Conditions(speeds))
    times = [came.simulated_s for came in found.published]
    sent = found.device_traffic["device-1"][1].sent / 3  # the three are equally large
    received = found.device_traffic["device-1"][1].received / 3  # versions 0 to 2
    upload_s, download_s = 2.0 + sent / 1e4, 2.0 + received / 1e4
    assert times == pytest.approx([0.0, *(number * (download_s + 1.5 + upload_s) for number in (1, 2, 3))], rel=0.01)
    assert [came.steps for came in found.published] == [0, 6, 12, 18]
    assert found.published[-1].bytes_received == found.fed_traffic.received


def test_who_does_not_wait_goes_on_while_another_uploads(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    slow = {"device-1": DeviceSpeed(0.1, bytes_per_s=1e3)}
    settings = devices(tmp_path, model, [1, 2])
    run(tmp_path, "even", settings, "gsfs")
    run(tmp_path, "slow", settings, "gsfs", conditions=Conditions(slow))
    uploads = {out: len(events(tmp_path / out / "device-0", "submit")) for out in ("even", "slow")}
    assert uploads["slow"] > 1
    adopted = {out: [event["step"] for event in events(tmp_path / out / "device-0", "adopt")] for out in ("even", "slow")}
    assert adopted["even"] and adopted["even"] != adopted["slow"]


@pytest.mark.parametrize("merge", ["fedex", "flexlora"])
def test_a_run_that_keeps_few_versions_is_the_one_that_keeps_all(tmp_path: Path, merge: str) -> None:
    settings = devices(tmp_path, save_tiny_model(tmp_path / "model", "bert"), [1, 2, 3])
    slow = Conditions({"device-2": DeviceSpeed(0.55, bytes_per_s=1e4)})
    found = {}
    for keep in (0, 1):
        chosen = StrategySettings(min_steps=1, max_steps=2, validate_every=0)
        fed = FedSettings(devices=3, strategy=chosen, merge=merge, keep_versions=keep)
        found[keep] = simulate(fed, settings, tmp_path / str(keep), conditions=slow)
    last = found[0].federation.version
    assert last is not None and last == found[1].federation.version and not found[1].federation.refused
    lags = [lag for event in events(tmp_path / "1" / "fed", "aggregate") for lag in event["lags"].values()]
    assert max(lags) >= 1, "updates of versions that are not the newest ones"
    assert len(list((tmp_path / "0" / "adapters").iterdir())) == last + 1 > 10
    assert len(list((tmp_path / "1" / "adapters").iterdir())) < 6
    for name, values in found[0].local.items():
        assert all(np.array_equal(found[1].local[name][key], value) for key, value in values.items())
    one, two = newest(tmp_path, "0", last), newest(tmp_path, "1", last)
    assert all(np.array_equal(one[key], two[key]) for key in one)


def test_examples_and_updates_can_be_replaced(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    settings = devices(tmp_path, model, [1, 2])
    seen: set[tuple[str, int]] = set()

    def nothing(header: UpdateHeader, state: AdapterState) -> AdapterState:
        seen.add((header.device, header.half))
        return {key: 0 * value for key, value in state.items()}

    found = run(tmp_path, "nothing", settings, conditions=Conditions(tamper=nothing))
    assert len(seen) == 4 and ("device-0", DEVICE) in seen and found.federation.version == 3
    first, last = newest(tmp_path, "nothing", 0), newest(tmp_path, "nothing", 3)
    assert all(np.array_equal(last[key], value) for key, value in first.items())

    own = load_splits(settings[0].data, "classification")
    alike = {"device-1": own}
    run(tmp_path, "plain", settings)
    run(tmp_path, "alike", settings, conditions=Conditions(splits=alike))
    assert losses_of(tmp_path / "plain" / "device-0")[:3] == losses_of(tmp_path / "alike" / "device-0")[:3]
    assert losses_of(tmp_path / "plain" / "device-1") != losses_of(tmp_path / "alike" / "device-1")


def test_a_device_whose_update_is_refused_ends_alone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")

    def broken(header: UpdateHeader, state: AdapterState) -> AdapterState:
        return {key: value * np.nan for key, value in state.items()} if header.device == "device-1" else state

    found = run(tmp_path, "out", devices(tmp_path, model, [1, 2, 3]), conditions=Conditions(tamper=broken))
    assert list(found.lost) == ["device-1"] and "not finite" in str(found.lost["device-1"])
    assert found.federation.finished and found.federation.version == 3 and found.federation.refused == 1
    took_part = [event["devices"] for event in events(tmp_path / "out" / "fed", "aggregate")]
    assert [sorted(devices) for devices in took_part] == [["device-0", "device-2"]] * 3
    waited = [later.simulated_s - sooner.simulated_s for sooner, later in pairwise(found.published)]
    assert waited[0] > 60 > waited[1]  # until it was away, and no more
    assert [len(losses_of(tmp_path / "out" / f"device-{number}")) for number in range(3)] == [9, 3, 9]


def test_a_device_whose_loss_is_not_finite_ends_alone_and_the_last_one_with_the_run(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    settings = devices(tmp_path, model, [1, 2])
    wild = settings[0].model_copy(update={"optimizer": OptimizerSettings(name="sgd", learning_rate=1e30)})
    found = run(tmp_path, "one", [wild, settings[1]], "gsfs")
    assert list(found.lost) == ["device-0"] and found.federation.finished
    assert len(losses_of(tmp_path / "one" / "device-1")) == 9
    with pytest.raises(SflError, match=r"not finite|is nan|is inf"):
        run(tmp_path, "all", [wild], "gsfs")


def test_fedbuff_wastes_no_step_however_unequal_the_speeds(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    speeds = {"device-0": DeviceSpeed(0.1), "device-1": DeviceSpeed(0.35)}
    chosen = StrategySettings(name="fedbuff", local_steps=3, buffer=1)
    settings = devices(tmp_path, model, [1, 2])
    simulate(FedSettings(devices=2, strategy=chosen), settings, tmp_path / "out", conditions=Conditions(speeds))
    adopted = {name: events(tmp_path / "out" / name, "adopt") for name in speeds}
    assert all(event["dropped_steps"] == 0 and event["step"] % 3 == 0 for found in adopted.values() for event in found)
    assert len(adopted["device-1"]) == 2
    made = events(tmp_path / "out" / "fed", "aggregate")
    assert sum(sum(event["steps"].values()) for event in made) == 18
    assert max(max(event["lags"].values()) for event in made) > 0


def test_local_validations_take_a_third_of_a_step_a_batch_and_the_last_test_nothing(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    settings = devices(tmp_path, model, [2])
    took = {}
    for every in (0, 3):
        chosen = StrategySettings(name="gsfs", min_steps=9, validate_every=every, quorum=1.0)
        out = tmp_path / str(every)
        took[every] = simulate(FedSettings(devices=1, strategy=chosen), settings, out).published[-1].simulated_s
    looks = [event for event in events(tmp_path / "3" / "device-0", "eval") if event["split"] == "validation"]
    batches = sum(-(-event["count"] // 4) for event in looks)
    assert batches and took[0] == pytest.approx(0.9)
    assert took[3] == pytest.approx(0.9 + batches * 0.1 / 3)
