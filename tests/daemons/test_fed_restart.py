"""The federation server is killed in the middle of a run and started again: nothing is lost or counted twice."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pytest

from sfl.adapters import peft_format
from sfl.adapters.state import AdapterState
from sfl.fed_server import ledger, roster_file
from sfl.settings import StrategySettings
from tests.daemons.processes import Daemon, Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all, stop_servers
from tests.fed_server.made import same
from tests.tiny import save_tiny_model

STRATEGIES = {
    "fedavg": StrategySettings(name="fedavg", local_steps=3),
    "gsfs": StrategySettings(name="gsfs", min_steps=2, max_steps=4),
}


def run(folder: Path, model: Path, strategy: StrategySettings, kill_after: Sequence[int]) -> AdapterState:
    """A run of two devices whose federation server is killed after these numbers of versions; its last version."""
    folder.mkdir()
    devices = several_devices(folder, model, (1, 2), steps=30)
    with Daemons(folder / "run", forked=True) as daemons:
        start_all(daemons, strategy, [edge_settings("edge", devices[0])], devices)
        for versions in kill_after:
            daemons["fed"].until(partial(has_made, versions))
            daemons["fed"].kill()
            daemons.again("fed")
        for device in devices:
            assert daemons[device.name].wait() == 0, daemons[device.name].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
        (end,) = daemons["fed"].events("end")
        made = sum(len(daemons[device.name].events("submit")) for device in devices)
        assert len(daemons["fed"].events("resume")) == len(kill_after) and end["submissions"] == made
        for name in ("edge", "fed"):
            assert "Traceback" not in daemons[name].log, daemons[name].log
    balance = ledger.check(folder / "run" / "fed", folder / "run" / "adapters")
    assert balance == ledger.Balance(accepted=made, counted=made)
    return peft_format.read(folder / "run" / "adapters" / f"v{end['version']}")[0]


def has_made(versions: int, fed: Daemon) -> bool:
    return len(fed.events("aggregate")) >= versions


@pytest.mark.parametrize("name", ["fedavg", pytest.param("gsfs", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_the_next_federation_server(tmp_path: Path, name: str) -> None:
    run(tmp_path / "run", save_tiny_model(tmp_path / "model", "bert"), STRATEGIES[name], (2, 4))


@pytest.mark.slow
def test_rounds_come_to_the_same_to_the_bit(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    undisturbed = run(tmp_path / "undisturbed", model, STRATEGIES["fedavg"], ())
    assert same(run(tmp_path / "disturbed", model, STRATEGIES["fedavg"], (1, 2, 5, 7)), undisturbed)


@pytest.mark.slow
def test_an_edge_server_goes_on_with_a_federation_server_that_has_lost_its_files(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    first, second = several_devices(tmp_path, model, (1, 2), steps=6)
    endless = first.model_copy(update={"steps": 1_000_000})
    with Daemons(tmp_path / "run", forked=True) as daemons:
        start_all(daemons, STRATEGIES["fedavg"], [edge_settings("edge", first)], (endless,))
        daemons["fed"].until(partial(has_made, 2))
        daemons["fed"].kill()
        shutil.rmtree(tmp_path / "run" / "adapters")
        for name in (ledger.FILE, roster_file.FILE):
            (daemons["fed"].out / name).unlink()
        shutil.rmtree(daemons["fed"].out / "pool")
        daemons.again("fed")
        assert daemons[endless.name].wait() == 1
        assert "has trained with versions that this federation server does not have" in daemons[endless.name].log
        config = (daemons[endless.name].out / "config.toml").read_text()
        addresses = re.findall(r'^(federation|edge) = "(.*)"$', config, re.MULTILINE)
        daemons.start("device", second.model_copy(update=dict(addresses)))
        assert daemons[second.name].wait() == 0, daemons[second.name].log
        assert "has begun anew" in daemons["edge"].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
    balance = ledger.check(tmp_path / "run" / "fed", tmp_path / "run" / "adapters")
    assert balance == ledger.Balance(accepted=2, counted=2)
