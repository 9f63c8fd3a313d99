"""Measuring a machine: the real processes once, and what is made of their answers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sfl.errors import ModelError
from sfl.planning import measure
from sfl.planning.calibration import installed_versions


@pytest.mark.parametrize("role", ["device", "edge"])
def test_a_measuring_process_trains_and_tells_its_peak(role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    measure._write_model(tmp_path / "tiny", measure._TINY)
    found = measure._run(role, tmp_path / "tiny", "fp32", "tiny")
    assert 100 < found.peak_mb < 2000
    assert found.seconds > 0 if role == "device" else found.seconds == 0


def test_a_process_that_breaks_off_is_no_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(ModelError, match="a measuring process broke off: exit code 1"):
        measure._run("edge", tmp_path, "fp32", "tiny")


def answers(monkeypatch: pytest.MonkeyPatch, fails: tuple[str, ...] = ()) -> None:
    def run(role: str, model: Path, precision: str, size: str) -> measure._Run:
        assert (model / "model.safetensors").exists()
        if precision in fails:
            raise ModelError(f"{precision} does not run here")
        return measure._Run(peak_mb={"device": 300.0, "edge": 400.0}[role], seconds=0.5)

    monkeypatch.setattr(measure, "_run", run)


def test_every_precision_gets_a_floor_and_a_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    told: list[str] = []
    found = measure.measure_machine(told.append)
    assert found.floor_mb == dict.fromkeys(("fp32", "bf16", "int8", "nf4"), 300.0 + measure._GRPC_MB)
    assert found.edge_floor_mb == 400.0 + measure._EDGE_GRPC_MB
    assert found.versions == installed_versions() and "memory of a device, fp32" in told
    # 2 operations for each weight and token forward, and backward 2 for those whose input needs a gradient: not q, k and v here.
    weights = 12 * 768**2
    assert 3.5 * weights * 4 * 64 < 0.5e9 * found.gflops["fp32"] < 4 * weights * 4 * 64


def test_a_precision_that_does_not_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, fails=("nf4",))
    told: list[str] = []
    found = measure.measure_machine(told.append)
    assert found.floor_mb.keys() == found.gflops.keys() == {"fp32", "bf16", "int8"}
    assert "nf4 is left out: nf4 does not run here" in told


def test_without_fp32_there_is_no_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, fails=("fp32",))
    with pytest.raises(ModelError, match="fp32 does not run here"):
        measure.measure_machine(lambda _: None)
