"""Joules over a stretch of time, from the sensor that the machine has. They are the whole machine's, not one process's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from sfl.profiling.board.files import ROOT, found, number_in, text_of
from sfl.profiling.board.jetson import module_power_w, power_rails_w


class Meter(Protocol):
    """Counts joules between its first `tick` and its last."""

    source: str

    def tick(self, now: float) -> None:
        """Take a reading at `now` (seconds of any clock that only goes forward)."""

    @property
    def joules(self) -> float | None:
        """Since the first tick; None before the second, or once a reading has failed."""


class RaplMeter:
    """x86: counters of microjoules, one for each package, that wrap around at a maximum of their own.

    A tick is due before any of them can have gone round twice: at 100 W that is 40 minutes for the usual range.
    """

    def __init__(self, packages: list[Path]) -> None:
        self.source = f"RAPL, {len(packages)} package{'s' if len(packages) > 1 else ''}"
        self._packages = packages
        self._ranges = [number_in(package / "max_energy_range_uj") for package in packages]
        self._last: list[int | None] | None = None
        self._microjoules: int | None = None
        self._failed = False

    def tick(self, now: float) -> None:
        reading = [number_in(package / "energy_uj") for package in self._packages]
        if self._last is not None:
            for used in map(_used, self._last, reading, self._ranges):
                if used is None:
                    self._failed = True
                else:
                    self._microjoules = (self._microjoules or 0) + used
        self._last = reading

    @property
    def joules(self) -> float | None:
        return None if self._failed or self._microjoules is None else self._microjoules / 1e6


class PowerMeter:
    """Jetson: watts of the module, integrated from tick to tick by the trapezoidal rule."""

    def __init__(self, read: Callable[[], float | None], source: str) -> None:
        self.source = source
        self._read = read
        self._last: tuple[float, float | None] | None = None
        self._joules: float | None = None
        self._failed = False

    def tick(self, now: float) -> None:
        watts = self._read()
        if self._last is not None:
            before, last_watts = self._last
            if watts is None or last_watts is None:
                self._failed = True
            else:
                self._joules = (self._joules or 0.0) + (now - before) * (watts + last_watts) / 2
        self._last = now, watts

    @property
    def joules(self) -> float | None:
        return None if self._failed else self._joules


def energy_meter(root: Path = ROOT) -> Meter | None:
    """The machine's own meter; None where there is no sensor or its readings may not be read (RAPL: only by root)."""
    packages = [
        package
        for package in found(root, "sys/class/powercap/intel-rapl:*")
        if (text_of(package / "name") or "").startswith("package") and number_in(package / "energy_uj") is not None
    ]
    if packages:
        return RaplMeter(packages)
    power = module_power_w(power_rails_w(root))
    if power is None:
        return None

    def read() -> float | None:
        now = module_power_w(power_rails_w(root))
        return None if now is None else now[0]

    return PowerMeter(read, f"INA3221, {power[1]}")


def _used(before: int | None, after: int | None, top: int | None) -> int | None:
    """Microjoules between two readings of a counter that starts again after `top`."""
    if before is None or after is None:
        return None
    if after >= before:
        return after - before
    return None if top is None else after - before + top
