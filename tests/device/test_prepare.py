"""From a device's settings to its requests and its adapter: the rank, and what the federation's policy asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import AdapterState
from sfl.data.settings import DataSettings
from sfl.device.prepare import PreparedDevice
from sfl.errors import AdapterError, SettingsError, WireError
from sfl.settings import DeviceSettings, LoraSettings
from sfl.v1.federation_pb2 import UploadPolicy
from sfl.wire.split import TrainingRules
from tests.flows import write_texts
from tests.tiny import save_tiny_model


def prepared(folder: Path, **changes: Any) -> PreparedDevice:
    model = save_tiny_model(folder / "model", "bert")
    data = DataSettings(path=write_texts(folder / "texts.txt", 60))
    return PreparedDevice.of(
        DeviceSettings(name="device-1", model=str(model), lora=LoraSettings(rank=4), cut=2, data=data, **changes)
    )


@pytest.mark.parametrize(("rank", "wire"), [(None, 0), (4, 0), (3, 3), (1, 1)])
def test_the_rank_reaches_the_federation_server_the_edge_and_the_adapter(tmp_path: Path, rank: int | None, wire: int) -> None:
    device = prepared(tmp_path, rank=rank)
    assert device.join_request().rank == wire
    assert device.session_request(0, UploadPolicy()).rank == wire
    assert device.join_request().lora.rank == 4  # which all agree on
    _, slots = device.load_half()
    state: AdapterState = {}
    for key in slots.keys(2):
        shape = tuple(slots.slots[key][0].get_parameter("weight").shape)
        size = rank or 4
        state[key] = np.ones((size, shape[1]) if key.part == "A" else (shape[0], size), dtype=np.float32)
    values = device.adapter(slots, state, 0, UploadPolicy()).values()
    assert all(np.array_equal(values[key], value) for key, value in state.items())
    other = {key: value[:-1] if key.part == "A" else value for key, value in state.items()}
    with pytest.raises(AdapterError, match="expected"):
        device.adapter(slots, other, 0, UploadPolicy())


def test_a_rank_above_that_of_the_federation(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"rank 5 is above lora\.rank 4, the largest of all devices: lower it"):
        prepared(tmp_path, rank=5)


def test_the_rules_are_the_policys(tmp_path: Path) -> None:
    device = prepared(tmp_path)
    policy = UploadPolicy(proximal=0.5, frozen_parts=["A"], shared_edge_adapter=True, fresh_optimizer=True)
    request = device.session_request(3, policy)
    assert request.rules == TrainingRules(0.5, ("A",), fresh_optimizer=True, shared_edge_adapter=True)
    assert request.version == 3
    with pytest.raises(WireError, match="cannot be frozen"):
        device.session_request(0, UploadPolicy(frozen_parts=["C"]))
