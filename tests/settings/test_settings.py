from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel, ValidationError

from sfl.adapters.layout import LoraSpec
from sfl.cli.names import settings_of
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings, LoraSettings, StrategySettings

DAEMONS: list[type[BaseModel]] = [FedSettings, EdgeSettings, DeviceSettings]


def device(**changes: object) -> DeviceSettings:
    return DeviceSettings.model_validate({"name": "d", "model": "m", "data": {"path": "p"}} | changes)


@pytest.mark.parametrize(
    "change",
    [
        {"cut": 0},
        {"steps": 0},
        {"batch_size": 0},
        {"max_length": 0},
        {"threads": -1},
        {"lora": {"rank": 0}},
        {"lora": {"alpha": 0}},
        {"lora": {"alpha": float("nan")}},
        {"lora": {"dropout": 1}},
        {"optimizer": {"learning_rate": 0}},
        {"optimizer": {"learning_rate": float("inf")}},
        {"optimizer": {"name": "adam"}},
        {"precision": "fp16"},
        {"task": "regression"},
        {"name": ""},
        {"name": "../elsewhere"},
        {"name": "two\nlines"},
        {"edge": "127.0.0.1"},
        {"edge": ":7301"},
        {"edge": "host:port"},
        {"edge": "host:65536"},
        {"wait_s": 0},
        {"unknown": 1},
    ],
)
def test_a_value_out_of_range_is_refused(change: dict[str, object]) -> None:
    device()  # the rest is right
    with pytest.raises(ValidationError):
        device(**change)


@pytest.mark.parametrize(
    "change", [{"quorum": 0}, {"quorum": 1.1}, {"alpha": 1}, {"alpha": 0}, {"min_steps": 0}, {"local_steps": 0}]
)
def test_a_strategy_setting_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        StrategySettings.model_validate(change)


def test_what_is_left_open_is_the_named_strategys_default() -> None:
    gsfs, printed, fedavg = (StrategySettings.model_validate({"name": name}) for name in ("gsfs", "gsfs-printed", "fedavg"))
    assert StrategySettings() == gsfs
    assert (gsfs.weights, gsfs.keep_progress, gsfs.final_upload, gsfs.min_steps, gsfs.threshold) == ("share", True, True, 8, 0.1)
    assert (printed.weights, printed.keep_progress, printed.final_upload, printed.min_steps) == ("frequency", False, False, 1)
    assert (printed.threshold, printed.threshold_growth, printed.threshold_decay) == (0.3, 1.0, 1.0)
    assert (fedavg.weights, fedavg.keep_progress, fedavg.final_upload) == ("examples", False, True)
    assert StrategySettings(name="gsfs-printed", min_steps=7).min_steps == 7


def test_fedavg_has_one_rule_of_weights() -> None:
    with pytest.raises(ValidationError, match="fedavg weighs by examples"):
        StrategySettings(name="fedavg", weights="frequency")


def test_a_federation_server_is_told_nothing_that_it_never_reads() -> None:
    assert not {"wait_s", "give_up_s"} & FedSettings.model_fields.keys()


@pytest.mark.parametrize("field", ["validation", "test", "partition_alpha"])
def test_data_settings_are_finite(field: str) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValidationError, match="finite"):
            device(data={"path": "p", field: value})


def test_addresses_in_the_usual_forms_are_taken() -> None:
    for address in ("localhost:7301", "192.168.1.10:0", "edge.example.org:65535", "[::1]:7301"):
        assert device(edge=address).edge == address


def test_settings_do_not_change_once_read() -> None:
    settings = device()
    with pytest.raises(ValidationError):
        settings.cut = 2  # type: ignore[misc]


def test_the_rate_cannot_rise_for_as_long_as_a_device_trains() -> None:
    with pytest.raises(ValidationError, match="warmup_steps 10 must be fewer than the device's 10 steps"):
        DeviceSettings.model_validate({"name": "d", "data": {"path": "x"}, "steps": 10, "optimizer": {"warmup_steps": 10}})


def test_lora_settings_become_the_specification_that_adapters_carry() -> None:
    settings = LoraSettings(rank=4, alpha=8, dropout=0.1, target_modules=("q_proj", "v_proj"))
    assert settings.spec() == LoraSpec(4, 8.0, 0.1, ("q_proj", "v_proj"))


@pytest.mark.parametrize("model", DAEMONS)
def test_every_setting_is_described(model: type[BaseModel]) -> None:
    missing = [name for name, field in settings_of(model).items() if not field.description]
    assert not missing


def test_settings_need_no_torch() -> None:
    program = (
        "import sys, sfl.settings, sfl.cli.load_settings; sys.exit(bool({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
