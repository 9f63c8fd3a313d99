"""A device with an address and its data, and nothing else: model, settings and cut come to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfl.settings import StrategySettings
from tests.daemons.processes import Daemons
from tests.daemons.runs import device_settings, edge_settings, start_all, stop_servers
from tests.flows import write_texts
from tests.metrics import losses_of
from tests.tiny import save_tiny_model

STEPS = 6


@pytest.mark.slow
def test_a_device_that_leaves_everything_open(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "opt")
    like = device_settings("device-1", model, write_texts(tmp_path / "texts.txt", 60), steps=STEPS)
    edge = edge_settings("edge", like, lowest_cut=2, cache=tmp_path / "edge-cache")
    device = type(like).model_validate(
        {**like.model_dump(exclude={"model"}), "cut": "auto", "precision": "int8", "cache": tmp_path / "cache"}
    )
    with Daemons(tmp_path / "run") as daemons:
        start_all(daemons, StrategySettings(name="fedavg", local_steps=STEPS), [edge], [device])
        assert daemons["device-1"].wait() == 0, daemons["device-1"].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
        (start,) = daemons["device-1"].events("start")
        (provision,) = daemons["device-1"].events("provision")
    assert start["cut"] == provision["cut"] and start["cut"] in (2, 3)  # of 4 blocks, from the edge's lowest cut
    assert len(losses_of(tmp_path / "run" / "device-1")) == STEPS
