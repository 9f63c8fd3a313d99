"""Joules from counters that wrap around and from watts; none where a reading fails."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfl.profiling.board.energy import PowerMeter, energy_meter
from tests.profiling.trees import ORIN_NANO, PI_4, X86, plant

RAPL = "sys/class/powercap/intel-rapl:0/energy_uj"


def test_rapl_counts_packages_only_and_wraps_around(tmp_path: Path) -> None:
    meter = energy_meter(plant(tmp_path, X86))
    assert meter is not None and meter.source == "RAPL, 1 package"
    meter.tick(0.0)
    assert meter.joules is None  # one reading is no stretch of time
    (tmp_path / RAPL).write_text("262143328850\n", encoding="ascii")
    meter.tick(1.0)
    assert meter.joules == pytest.approx(0.32885)
    (tmp_path / RAPL).write_text("5000000\n", encoding="ascii")
    meter.tick(2.0)
    assert meter.joules == pytest.approx(0.32885 + 5.0)


def test_a_counter_that_goes_away_leaves_nothing_measured(tmp_path: Path) -> None:
    meter = energy_meter(plant(tmp_path, X86))
    assert meter is not None
    meter.tick(0.0)
    (tmp_path / RAPL).unlink()
    meter.tick(1.0)
    (tmp_path / RAPL).write_text("262143000001\n", encoding="ascii")
    meter.tick(2.0)
    meter.tick(3.0)
    assert meter.joules is None


def test_a_jetson_s_watts_are_those_of_its_input_rail(tmp_path: Path) -> None:
    meter = energy_meter(plant(tmp_path, ORIN_NANO))
    assert meter is not None and meter.source == "INA3221, VDD_IN"
    meter.tick(10.0)
    (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input").write_text("2856\n", encoding="ascii")
    meter.tick(12.0)
    assert meter.joules == pytest.approx(2 * (4.984 * 1.856 + 4.984 * 2.856) / 2)


def test_without_an_input_rail_all_rails_together(tmp_path: Path) -> None:
    root = plant(tmp_path, ORIN_NANO)
    (root / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/in1_label").write_text("VDD_GPU_SOC\n", encoding="ascii")
    meter = energy_meter(root)
    assert meter is not None and meter.source == "INA3221, VDD_CPU_GPU_CV+VDD_GPU_SOC+VDD_SOC"


def test_a_failed_reading_is_not_bridged() -> None:
    readings = iter([4.0, None, 4.0, 4.0])
    meter = PowerMeter(lambda: next(readings), "a rail")
    for now in range(4):
        meter.tick(now)
    assert meter.joules is None


def test_no_sensor_no_meter(tmp_path: Path) -> None:
    assert energy_meter(plant(tmp_path / "pi", PI_4)) is None
    assert energy_meter(tmp_path / "nothing") is None
