"""How warm it is."""

from __future__ import annotations

from pathlib import Path

from sfl.profiling.board.files import ROOT, found, number_in, text_of


def temperatures_c(root: Path = ROOT) -> dict[str, float]:
    """Degrees Celsius by thermal zone (`cpu-thermal`, `gpu-thermal`, `x86_pkg_temp`); zones that are off are left out."""
    result: dict[str, float] = {}
    for zone in found(root, "sys/class/thermal/thermal_zone*"):
        name, millidegrees = text_of(zone / "type"), number_in(zone / "temp")
        if name is not None and millidegrees is not None:
            result[name if name not in result else f"{name} ({zone.name})"] = millidegrees / 1000
    return result
