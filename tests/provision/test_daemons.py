"""Real daemons: a device that has nothing but the edge's address trains as one that has the model.

They are not forked: that a guest fetches its half before it imports torch, and loads it then, is what its start is made of.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfl.cluster.plan import free_addresses
from sfl.device import provision
from sfl.device.provision import provided
from sfl.settings import DeviceSettings, FedSettings, StrategySettings
from tests.daemons.processes import Daemons, plain
from tests.daemons.runs import device_settings, edge_settings
from tests.flows import write_texts
from tests.metrics import losses_of
from tests.tiny import save_tiny_model

STEPS = 10
LEFT_OUT = ("model", "task", "lora")


@pytest.mark.parametrize("precision", ["int8", *(pytest.param(each, marks=pytest.mark.slow) for each in ("fp32", "bf16"))])
def test_a_provided_device_trains_as_one_with_the_model(tmp_path: Path, precision: str) -> None:
    model, data = save_tiny_model(tmp_path / "model", "opt"), write_texts(tmp_path / "texts.txt", 120)
    fed, edge = free_addresses(2)
    common: dict[str, Any] = {"federation": fed, "edge": edge, "steps": STEPS, "cut": 2, "precision": precision, "wait_s": 100}
    device = device_settings("owner", model, data, **common)
    given = {name: value for name, value in plain(device).items() if name not in LEFT_OUT}
    without = {**given, "name": "guest", "cache": str(tmp_path / "cache")}
    with Daemons(tmp_path / "run") as daemons:
        daemons.start("fed", FedSettings(devices=2, strategy=StrategySettings(name="fedavg", local_steps=STEPS), listen=fed))
        daemons.start("edge", edge_settings("edge", device, listen=edge, federation=fed, cache=tmp_path / "edge-cache"))
        daemons.start("device", device)
        daemons.start("device", without)
        for name in ("owner", "guest"):
            assert daemons[name].wait(100) == 0, daemons[name].log
        losses = losses_of(daemons["owner"].out)
        assert len(losses) == STEPS and len(set(losses)) > 1
        assert losses_of(daemons["guest"].out) == losses
        (first,) = daemons["guest"].events("provision")
        assert first["bytes_cached"] == 0 < first["bytes"] < first["bytes_received"] < first["bytes"] + 5_000

        again = provided(DeviceSettings.model_validate({**without, "out": tmp_path / "again"}))
        provision.release_halves()
        assert again.model is not None and Path(again.model).parent.name == f"cut-2-{precision}"
        packed, sent = daemons["edge"].events("pack"), daemons["edge"].events("provide")
        assert [event["bytes"] for event in packed] == [first["bytes"]]
        assert sum(event["bytes"] for event in sent) == first["bytes"]  # for the first start, and nothing for the second
        assert {name: daemons[name].stop() for name in ("edge", "fed")} == {"edge": 0, "fed": 0}
        (end,) = daemons["edge"].events("end")
        assert end["bytes_provided"] > first["bytes"]
