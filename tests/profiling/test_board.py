"""What is read of each board, and that nothing is made up where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfl.profiling.board import raspberry
from sfl.profiling.board.facts import board_facts
from sfl.profiling.board.identity import Identity
from sfl.profiling.board.memory import BoardMemory
from sfl.profiling.board.raspberry import Throttling, decode, throttling
from sfl.profiling.table import board_lines
from tests.profiling.trees import ORIN_NANO, PI_4, PI_5, X86, plant


def nobody() -> str | None:
    return None


def test_a_pi_4_with_a_weak_power_supply(tmp_path: Path) -> None:
    board = board_facts(plant(tmp_path, PI_4), nobody)
    assert board.identity == Identity("Raspberry Pi 4 Model B Rev 1.4", "Cortex-A72", 4)
    assert board.memory.ram_mb == pytest.approx(948304 * 1024 / 1e6)
    assert board.memory.swap_mb == pytest.approx(102396 * 1024 / 1e6)
    assert board.memory.limit_mb is None  # the memory controller is off
    assert board.temperatures_c == {"cpu-thermal": 61.342}
    assert board.throttling == Throttling(0x50005, ("under-voltage", "throttled"), ("under-voltage", "throttled"))
    assert board.power_rails_w == {} and board.power_mode is None and board.shared_gpu_mb is None


def test_a_pi_5_asks_the_firmware(tmp_path: Path) -> None:
    root = plant(tmp_path, PI_5)
    board = board_facts(root, lambda: "throttled=0x80000\n")
    assert board.identity == Identity("Raspberry Pi 5 Model B Rev 1.0", "Cortex-A76", 4)
    assert board.throttling == Throttling(0x80000, (), ("soft temperature limit",))
    assert board.memory.limit_mb == pytest.approx(536.870912)
    # Without vcgencmd there is still the alarm, which knows nothing of the past.
    assert throttling(root, nobody) == Throttling(None, (), None)
    (root / "sys/class/hwmon/hwmon4/in0_lcrit_alarm").write_text("1\n", encoding="ascii")
    assert throttling(root, nobody) == Throttling(None, ("under-voltage",), None)
    assert throttling(root, lambda: 'error=1 error_msg="Command not registered"') == Throttling(None, ("under-voltage",), None)


def test_the_firmware_is_asked_by_the_command_that_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text('#!/bin/sh\n[ "$1" = get_throttled ] && echo throttled=0x50000\n', encoding="ascii")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert raspberry.vcgencmd() == "throttled=0x50000\n"
    program.write_text("#!/bin/sh\nexit 255\n", encoding="ascii")
    assert raspberry.vcgencmd() is None
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert raspberry.vcgencmd() is None


@pytest.mark.parametrize(
    ("bits", "now", "since"),
    [
        (0x0, (), ()),
        (0x2, ("frequency capped",), ()),
        (0x80008, ("soft temperature limit",), ("soft temperature limit",)),
        (0xE0000, (), ("frequency capped", "throttled", "soft temperature limit")),
    ],
)
def test_the_bits_in_words(bits: int, now: tuple[str, ...], since: tuple[str, ...]) -> None:
    assert decode(bits) == Throttling(bits, now, since)


def test_a_jetson_in_a_container(tmp_path: Path) -> None:
    board = board_facts(plant(tmp_path, ORIN_NANO), nobody)
    assert board.identity == Identity("NVIDIA Jetson Orin Nano Developer Kit", "Cortex-A78AE", 6)
    assert board.temperatures_c == {"cpu-thermal": 52.187, "gpu-thermal": 51.031, "tj-thermal": 52.187}
    assert board.shared_gpu_mb == pytest.approx(141896 * 1024 / 1e6)
    assert board.power_rails_w == pytest.approx({"VDD_IN": 9.250304, "VDD_CPU_GPU_CV": 3.18464, "VDD_SOC": 1.711744})
    assert board.power_mode == "7W"
    assert board.memory.limit_mb == pytest.approx(1073.741824)  # the container's own group is mounted at the top
    assert board.throttling is None
    (tmp_path / "etc/nvpmodel.conf").unlink()
    assert board_facts(tmp_path, nobody).power_mode == "mode 1"


def test_a_pc(tmp_path: Path) -> None:
    board = board_facts(plant(tmp_path, X86), nobody)
    assert board.identity == Identity("LENOVO 20XW004AGE", "11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz", 8)
    assert board.temperatures_c == {"acpitz": 25.0, "x86_pkg_temp": 58.0}
    assert board.memory.limit_mb == pytest.approx(2147.483648)
    assert board.throttling is None and board.power_rails_w == {}


def test_where_there_is_nothing_nothing_is_measured(tmp_path: Path) -> None:
    board = board_facts(tmp_path, nobody)
    assert board.identity == Identity(None, None, None)
    assert board.memory == BoardMemory(None, None, None, None, None)
    assert (board.temperatures_c, board.throttling, board.shared_gpu_mb, board.power_rails_w) == ({}, None, None, {})
    shown = dict(board_lines(board))
    assert shown["model"] == shown["temperature"] == "not measured"


def test_what_a_person_reads(tmp_path: Path) -> None:
    lines = dict(board_lines(board_facts(plant(tmp_path / "pi", PI_4), nobody)))
    assert lines["held back by"] == "now: under-voltage, throttled; since boot: under-voltage, throttled"
    lines = dict(board_lines(board_facts(plant(tmp_path / "jetson", ORIN_NANO), nobody)))
    assert lines["GPU's share of RAM"] == "145.3 MB, all processes"
    assert "VDD_IN 9.25 W" in lines["power rails"]


def test_this_machine_can_be_read() -> None:
    board = board_facts()
    assert dict(board_lines(board))["CPU"]
    if Path("/proc/meminfo").exists():
        assert board.memory.ram_mb is not None and board.memory.ram_mb > 100
