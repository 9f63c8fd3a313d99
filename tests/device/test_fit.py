"""A device's cut and what it does with freed memory, from the memory that is free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfl.data.settings import DataSettings
from sfl.device import fit
from sfl.device.fit import fitted
from sfl.errors import SettingsError
from sfl.model.load import load_config
from sfl.planning.apart import ChosenCut
from sfl.planning.choice import choose_cut, require_fits
from sfl.planning.request import PlanRequest
from sfl.settings import DeviceSettings
from sfl.state_file import write_state
from tests.tiny import tiny_config


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder with a configuration and no weights."""
    tiny_config("opt", layers=4).save_pretrained(tmp_path)
    return str(tmp_path)


def device(model: str, **changes: Any) -> DeviceSettings:
    return DeviceSettings(name="device-1", model=model, data=DataSettings(path=Path("none")), **changes)


def memory(monkeypatch: pytest.MonkeyPatch, free_mb: float | None) -> None:
    monkeypatch.setattr(fit, "available_memory", lambda: free_mb)


@pytest.mark.parametrize(("free_mb", "asked", "tight"), [(8000.0, None, False), (None, None, False), (8000.0, True, True)])
def test_where_memory_is_plenty_nothing_is_planned(
    model: str, monkeypatch: pytest.MonkeyPatch, free_mb: float | None, asked: bool | None, tight: bool
) -> None:
    memory(monkeypatch, free_mb)
    monkeypatch.setattr(fit, "choose_cut_apart", None)
    found = fitted(device(model, cut=3, tight_memory=asked), model)
    assert (found.cut, found.tight_memory) == (3, tight)


def plan_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the planner answer in this process; that one of its own answers alike is for its own tests."""

    def chosen(model: str, request: PlanRequest, memory_mb: float, cut: int | None = None) -> ChosenCut:
        config = load_config(model)
        plan = choose_cut(config, request, memory_mb) if cut is None else require_fits(config, request, cut, memory_mb)
        return ChosenCut(plan.cut, plan.device_mb)

    monkeypatch.setattr(fit, "choose_cut_apart", chosen)


@pytest.mark.parametrize(("cut", "lowest"), [("auto", 3), (2, 1)])
def test_where_memory_is_short_the_cut_is_planned(model: str, monkeypatch: pytest.MonkeyPatch, cut: Any, lowest: int) -> None:
    memory(monkeypatch, 900.0)
    if cut != "auto":
        plan_here(monkeypatch)
    found = fitted(device(model, cut=cut), model, lowest)
    assert found.tight_memory is True
    assert found.cut == (3 if cut == "auto" else 2)  # of 4 blocks, an edge from cut 3 leaves one choice


def test_a_run_that_goes_on_keeps_its_cut(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 8000.0)
    monkeypatch.setattr(fit, "choose_cut_apart", lambda *arguments: None)
    (tmp_path / "out" / "state").mkdir(parents=True)
    write_state(tmp_path / "out" / "state" / "checkpoint-4.state", {"identity": {"cut": 3}}, {})
    assert fitted(device(model, cut="auto", out=tmp_path / "out"), model).cut == 3
    assert fitted(device(model, cut=2, out=tmp_path / "out"), model).cut == 2  # and is refused later, by name


def test_a_cut_that_does_not_fit_is_refused_with_the_plan(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 305.0)
    plan_here(monkeypatch)
    large = device(model, cut=2, batch_size=512, max_length=64)
    with pytest.raises(SettingsError, match=r"cut 2 does not fit 305 MB: it needs \d+ MB \(process \d+, weights \d+"):
        fitted(large, model)


def test_less_than_a_process_takes_is_refused_at_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 200.0)
    monkeypatch.setattr(fit, "choose_cut_apart", None)
    with pytest.raises(SettingsError, match=r"no cut fits 200 MB: a device that holds no block at all takes \d+ MB"):
        fitted(device(model, cut="auto"), model)


def test_the_plan_is_not_for_a_gpu(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, 900.0)
    monkeypatch.setattr(fit, "choose_cut_apart", None)
    assert fitted(device(model, cut=2, run_on="cuda"), model).cut == 2
    with pytest.raises(SettingsError, match="not a GPU's: set the cut"):
        fitted(device(model, cut="auto", run_on="cuda"), model)


def test_auto_needs_a_system_that_tells_its_memory(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory(monkeypatch, None)
    with pytest.raises(SettingsError, match="set the cut to a number"):
        fitted(device(model, cut="auto"), model)
