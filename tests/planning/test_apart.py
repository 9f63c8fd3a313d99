"""The planner in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sfl.data.settings import DataSettings
from sfl.errors import SettingsError
from sfl.planning.apart import choose_cut_apart
from sfl.planning.choice import choose_cut
from sfl.planning.request import PlanRequest
from sfl.settings import DeviceSettings
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_it_chooses_as_the_planner_does(tmp_path: Path) -> None:
    config = tiny_config("qwen2", layers=4)
    config.save_pretrained(tmp_path / "model")
    settings = DeviceSettings(
        name="pi", model=str(tmp_path / "model"), data=DataSettings(path=tmp_path), batch_size=4, micro_batch=2
    )
    request = PlanRequest.of(settings, lowest_cut=2)
    here = choose_cut(config, request, 5000)
    figures = (here.device_mb, here.half_mb, here.checkpoint_mb)
    assert choose_cut_apart(str(tmp_path / "model"), request, 5000) == (here.cut, *map(pytest.approx, figures))


def test_its_errors_arrive() -> None:
    with pytest.raises(SettingsError, match="cut 3 does not fit 20 MB"):
        choose_cut_apart(tiny_config("opt").to_dict(), PlanRequest(), 20, cut=3)


def test_a_planner_that_breaks_off_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(SettingsError, match=r"planning the cut broke off \(exit code 1\)"):
        choose_cut_apart("somewhere", PlanRequest(), 5000)


def test_asking_needs_no_torch() -> None:
    script = "import sys, sfl.planning.apart; print(sorted({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


def test_its_warnings_arrive(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    request = PlanRequest(batch_size=1, max_length=8)
    least = choose_cut(tiny_config("opt"), request, 5000).device_mb
    with caplog.at_level("WARNING", logger="sfl"):
        assert choose_cut_apart(tiny_config("opt").to_dict(), request, 1.01 * least, cut=1) is not None
    assert "are free" in caplog.text


def test_a_cut_that_is_set_is_taken_without_an_answer(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with caplog.at_level("WARNING", logger="sfl"):
        assert choose_cut_apart("somewhere", PlanRequest(), 5000, cut=2) is None
    assert "whether cut 2 fits is not known" in caplog.text
