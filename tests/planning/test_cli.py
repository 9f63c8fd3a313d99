"""`sfl plan` on a folder that holds a configuration and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfl.cli.main import app
from sfl.errors import ModelError, SflError
from sfl.planning.calibration import Calibration, installed_versions, write_calibration
from tests.tiny import tiny_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With nothing kept on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    tiny_config("llama", layers=4).save_pretrained(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["config.json"]
    return tmp_path / "model"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_table_of_all_cuts_and_a_sentence(folder: Path) -> None:
    shown = run("--model", folder, "--memory", 5000)
    assert "fp32 base, fp32 activations" in shown and "memory 5000 MB given" in shown
    assert [line.split()[1] for line in shown.splitlines() if line.startswith("│")] == [">", "2", "3"]
    assert "recommended with fp32: cut 1: its " in shown and "sfl plan --calibrate measures this machine" in shown


def test_json(folder: Path) -> None:
    options = ("--precision", "all", "--batch-size", 4, "--max-length", 32, "--micro-batch", 2, "--checkpointing", "--devices", 3)
    found = json.loads(run("--model", folder, "--memory", 5000, "--json", *options))
    assert found["memory_mb"] == 5000 and found["memory_given"] is True
    assert [plan["precision"] for plan in found["plans"]] == ["fp32", "bf16", "int8", "nf4"]
    assert found["recommended"] == {"precision": "fp32", "cut": 1}
    first = found["plans"][0]
    assert first["request"]["micro_batch"] == 2 and first["request"]["compute"] == "fp32"
    assert [cut["cut"] for cut in first["cuts"]] == [1, 2, 3]
    cut = first["cuts"][0]
    parts = [value for name, value in cut["device"].items() if name != "peak_in"]
    assert cut["fits"] == "yes" and cut["device_mb"] == pytest.approx(sum(parts), abs=0.4)
    assert cut["step_s"] is None and first["recommended"] == 1 and first["reason"].startswith("cut 1: ")


def test_of_several_precisions_the_cuts_that_tell_them_apart(tmp_path: Path) -> None:
    tiny_config("opt", layers=10).save_pretrained(tmp_path)
    plans = json.loads(run("--model", tmp_path, "--memory", 5000, "--json"))["plans"]
    memory = plans[0]["cuts"][5]["device_mb"] + 0.05
    shown = run("--model", tmp_path, "--memory", memory, "--precision", "all")
    cuts = [line.split("│")[1].replace(">", "").strip() for line in shown.splitlines() if line.startswith("│")]
    best = next(line for line in shown.splitlines() if line.startswith("recommended with fp32: cut ")).split("cut ")[1]
    expected = {1, int(best.partition(":")[0]), 6, 7, 9}
    assert cuts[: len(expected)] == [str(cut) for cut in sorted(expected)] and len(cuts) <= 4 * 5
    assert "all cuts with a single --precision, or --json" in shown
    assert "all cuts with" not in run("--model", tmp_path, "--memory", memory)


def test_nothing_fits(folder: Path) -> None:
    shown = run("--model", folder, "--memory", 20)
    assert "no cut fits 20 MB" in shown


def test_without_a_limit_what_is_free_here(folder: Path) -> None:
    found = json.loads(run("--model", folder, "--json"))
    assert found["memory_given"] is False and found["memory_mb"] > 0


def test_with_a_calibration_there_are_step_times(folder: Path) -> None:
    write_calibration(Calibration({"fp32": 123.0}, 456.0, {"fp32": 2.0}, {**installed_versions(), "peft": "0.1"}))
    options = ("--memory", 5000, "--bandwidth-mbit", 10, "--rtt-ms", 50, "--edge-gflops", 100)
    found = json.loads(run("--model", folder, "--json", *options))
    cut = found["plans"][0]["cuts"][0]
    assert cut["device"]["floor_mb"] == 123.0
    assert cut["time"]["link"] == pytest.approx(8 * (cut["bytes_up"] + cut["bytes_down"]) / 1e7 + 0.05, abs=1e-3)
    assert cut["time"]["device"] == pytest.approx(cut["device_gflop"] / 2, abs=1e-3)
    assert found["plans"][0]["speeds"]["assumed"] == []
    shown = run("--model", folder, *options)
    assert "the calibration is out of date: it was measured with peft 0.1, not " in shown


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--targets", "nonsense"), ModelError, "LoRA target 'nonsense' matches nothing"),
        (("--max-length", 4096), ModelError, "at most 128"),
        (("--lowest-cut", 9), ModelError, "a cut is between 1 and 3"),
        (("--bandwidth-mbit", 0), SflError, "bandwidth_mbit is 0.0"),
    ],
)
def test_mistakes(folder: Path, options: tuple, error: type[SflError], message: str) -> None:
    with pytest.raises(error, match=message):
        run("--model", folder, *options)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        run("--model", tmp_path)
