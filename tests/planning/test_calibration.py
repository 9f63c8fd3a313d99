"""What is kept of a machine's measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfl.errors import SettingsError
from sfl.planning.calibration import (
    DEFAULT,
    Calibration,
    calibration_file,
    installed_versions,
    read_calibration,
    write_calibration,
)


def test_without_one_the_defaults_hold_and_say_so(tmp_path: Path) -> None:
    found = read_calibration(tmp_path / "none.json")
    assert found == DEFAULT and "defaults" in found.source and found.stale is None
    assert found.gflops == {}


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "calibration.json"
    write_calibration(Calibration({"fp32": 250.0, "int8": 260.0}, 300.0, {"fp32": 12.5}, installed_versions()), path)
    found = read_calibration(path)
    assert found.floor_mb == {**DEFAULT.floor_mb, "fp32": 250.0, "int8": 260.0}
    assert found.gflops == {"fp32": 12.5} and found.stale is None and str(path) in found.source
    assert [file.name for file in path.parent.iterdir()] == ["calibration.json"]


def test_another_version_makes_it_stale(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_calibration(Calibration({}, 300.0, {}, {**installed_versions(), "torch": "1.0"}), path)
    stale = read_calibration(path).stale
    assert stale is not None and stale.startswith("it was measured with torch 1.0, not ")


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        "{}",
        json.dumps({"floor_mb": {"fp32": -1}, "edge_floor_mb": 1, "gflops": {}, "versions": {}}),
        json.dumps({"floor_mb": {"fp64": 1}, "edge_floor_mb": 1, "gflops": {}, "versions": {}}),
        json.dumps({"floor_mb": {"fp32": "many"}, "edge_floor_mb": 1, "gflops": {}, "versions": {}}),
    ],
)
def test_a_damaged_one_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(text)
    with pytest.raises(SettingsError, match="sfl plan --calibrate"):
        read_calibration(path)


def test_it_lies_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration_file() == tmp_path / "sfl" / "calibration.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert calibration_file() == Path.home() / ".cache" / "sfl" / "calibration.json"
