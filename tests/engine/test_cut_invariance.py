"""Whatever strategy and merge make a version: where the devices cut their models does not change it."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from pydantic import ValidationError

from sfl.adapters import peft_format
from sfl.adapters.state import FROZEN_A, FROZEN_B, AdapterState, edge_half
from sfl.data.settings import DataSettings
from sfl.federation_settings import MergeName, StrategyName
from sfl.settings import DeviceSettings, FedSettings, LoraSettings, OptimizerSettings
from sfl.simulation import LoadedHalves, Simulated, simulate
from tests.flows import write_texts
from tests.tiny import save_tiny_model
from tests.unsplit import read_trained, train_unsplit_together

DEVICES, LAYERS, STEPS, LOCAL_STEPS = 3, 4, 4, 2
RULE = {
    "quorum": 0.6,  # so that versions are made of several updates
    "local_steps": LOCAL_STEPS,
    "min_steps": LOCAL_STEPS,
    "max_steps": LOCAL_STEPS,
    "pace": 0,
    "validate_every": LOCAL_STEPS,
}


def fed(strategy: str, merge: str = "average", **more: Any) -> FedSettings:
    return FedSettings.model_validate({"devices": DEVICES, "strategy": {"name": strategy, **RULE, **more}, "merge": merge})


def allowed(strategy: str, merge: str) -> bool:
    try:
        fed(strategy, merge)
    except ValidationError:
        return False
    return True


PAIRS = [
    (strategy, merge)
    for strategy in get_args(StrategyName)
    for merge in get_args(MergeName)
    if strategy != "splitlora" and allowed(strategy, merge)
]
# Each strategy, and each merge under one that has rounds and one that has none. All pairs take half a minute more.
ALWAYS = {pair for pair in PAIRS if pair[1] == "average" or pair[0] in ("fedavg", "gsfs")}


class Bench:
    """A tiny model, its halves and three devices' texts, which all runs share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._model = save_tiny_model(folder / "model", "bert", layers=LAYERS)
        self._texts = [write_texts(folder / f"texts-{number}.txt", 40 + 20 * number, seed=number) for number in range(DEVICES)]
        self._halves = LoadedHalves()

    def devices(self, cuts: list[int], ranks: list[int] | None = None) -> list[DeviceSettings]:
        return [
            DeviceSettings(
                name=f"device-{number}",
                model=str(self._model),
                lora=LoraSettings(rank=2, alpha=4),
                cut=cut,
                rank=ranks and ranks[number],
                data=DataSettings(path=self._texts[number]),
                batch_size=4,
                max_length=16,
                steps=STEPS,
                validation_batches=1,
                optimizer=OptimizerSettings(learning_rate=5e-3),
            )
            for number, cut in enumerate(cuts)
        ]

    def run(self, name: str, settings: FedSettings, devices: list[DeviceSettings]) -> tuple[Simulated, AdapterState]:
        """A simulation and its last version."""
        done = simulate(settings, devices, self.folder / name, halves=self._halves)
        return done, peft_format.read(self.version(name, done.published[-1].version))[0]

    def version(self, name: str, number: int) -> Path:
        return self.folder / name / "adapters" / f"v{number}"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("cuts"))


def weights(state: AdapterState) -> AdapterState:
    """What a version adds to the base's weights, and the head: what an SVD's factors are only up to their signs."""
    result: AdapterState = {}
    for key, value in state.items():
        if key.part in ("A", FROZEN_A):
            b = state[key._replace(part="B" if key.part == "A" else FROZEN_B)]
            whole = key._replace(part="weight")
            result[whole] = result.get(whole, np.float32(0)) + b @ value
        elif key.part not in ("B", FROZEN_B):
            result[key] = value
    return result


def same(found: AdapterState, expected: AdapterState) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.linalg.norm(found[key] - value) <= 1e-5 * np.linalg.norm(value), key


@pytest.mark.parametrize(
    ("strategy", "merge"), [pair if pair in ALWAYS else pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS]
)
def test_the_cuts_change_no_version(bench: Bench, strategy: str, merge: str) -> None:
    chance = random.Random(f"{strategy} {merge}")
    draws = [[chance.randint(1, LAYERS - 1) for _ in range(DEVICES)] for _ in range(9)]
    cuts, other = draws[0], next(draw for draw in draws if draw != draws[0])
    ranks = [chance.randint(1, 2) for _ in range(DEVICES)]
    settings, name = fed(strategy, merge), f"{strategy}-{merge}"
    one, expected = bench.run(f"{name}-one", settings, bench.devices(cuts, ranks))
    two, found = bench.run(f"{name}-two", settings, bench.devices(other, ranks))
    assert len(two.published) == len(one.published) > 1 and not one.lost | two.lost
    same(weights(found), weights(expected))
    start = weights(peft_format.read(bench.version(f"{name}-one", 0))[0])
    assert all(np.abs(value - start[key]).max() > 1e-5 for key, value in weights(expected).items())


def test_fedavg_is_an_unsplit_federation_of_peft(bench: Bench) -> None:
    devices = bench.devices([3, 1, 2])
    done, found = bench.run("split", fed("fedavg"), devices)
    layout = peft_format.read(bench.version("split", 0))[1]
    model = train_unsplit_together(devices, layout.labels, bench.version("split", 0), LOCAL_STEPS)
    assert done.published[-1].version == STEPS // LOCAL_STEPS
    same(found, read_trained(model, bench.version("split", 0), bench.folder / "peft"))


@pytest.mark.parametrize("cut", range(1, LAYERS))
def test_splitlora_publishes_the_edges_one_copy(bench: Bench, cut: int) -> None:
    done, found = bench.run(f"splitlora-{cut}", fed("splitlora"), bench.devices([cut] * DEVICES))
    copies = [edge_half(local, cut) for local in done.local.values()]
    for copy in copies:
        same(edge_half(found, cut), copy)
