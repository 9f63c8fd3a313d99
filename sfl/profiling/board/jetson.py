"""A Jetson: memory that the GPU has of the shared RAM, power rails, power mode."""

from __future__ import annotations

import re
from pathlib import Path

from sfl.profiling.board.files import ROOT, found, number_in, text_of

_UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
# Rails that carry all that the module draws; the others are parts of it.
_WHOLE = ("VDD_IN", "POM_5V_IN")


def gpu_memory_mb(root: Path = ROOT) -> float | None:
    """MB that all processes hold through NvMap, out of the same RAM as everything else. Only root may read it."""
    table = text_of(root / "sys/kernel/debug/nvmap/iovmm/clients") or ""
    for line in table.splitlines():
        words = line.split()
        if words and words[0] == "total" and (match := re.fullmatch(r"(\d+)([KMG]?)", words[-1])):
            return int(match[1]) * _UNITS[match[2]] / 1e6
    return None


def power_rails_w(root: Path = ROOT) -> dict[str, float]:
    """Watts by rail from the INA3221 monitors (millivolts times milliamperes); empty where there are none."""
    rails: dict[str, float] = {}
    for label in found(root, "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/in[0-9]*_label"):
        name, channel = text_of(label), label.name.removeprefix("in").removesuffix("_label")
        millivolts = number_in(label.with_name(f"in{channel}_input"))
        milliamperes = number_in(label.with_name(f"curr{channel}_input"))
        # Channel 7 is the sum of the shunt voltages: no rail, and without a current of its own.
        if name is not None and name != "NC" and millivolts is not None and milliamperes is not None:
            rails[name] = millivolts * milliamperes / 1e6
    return rails


def module_power_w(rails: dict[str, float]) -> tuple[float, str] | None:
    """Watts of the whole module and the rails that say so: the input rail, or without one all rails; None for none."""
    for name in _WHOLE:
        if name in rails:
            return rails[name], name
    return (sum(rails.values()), "+".join(sorted(rails))) if rails else None


def power_mode(root: Path = ROOT) -> str | None:
    """The name of the nvpmodel mode in force, such as `15W`, or its number where the list of modes is not there."""
    status = re.search(r"pmode:(\d+)", text_of(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    number = int(status[1])
    modes = text_of(root / "etc/nvpmodel.conf") or ""
    name = re.search(rf"^<\s*POWER_MODEL\s+ID={number}\s+NAME=(\S+)", modes, re.MULTILINE)
    return name[1] if name else f"mode {number}"
