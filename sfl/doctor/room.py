"""Memory against the plan, and disks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfl.cache.cache import default_folder
from sfl.doctor.finding import Finding, broke, failed, passed, skipped, warned
from sfl.errors import SflError
from sfl.planning.apart import ChosenCut, choose_cut_apart
from sfl.planning.available import available_memory
from sfl.planning.calibration import MARGIN
from sfl.planning.request import PlanRequest
from sfl.settings import DeviceSettings

_LEAST_MB = 350.0  # that any device takes, by the defaults of the calibration
_SPARE_MB = 100.0  # of disk for logs and metrics
_CHECKPOINTS = 3  # at most that a device has on disk at a time, one of them being written


def check_memory() -> Finding:
    """What this process can have, with nothing to hold it against but what the smallest device takes."""
    memory = available_memory()
    if memory is None:
        return skipped("memory", "this system does not say how much is free")
    line = f"{memory:.0f} MB can be had"
    if memory < _LEAST_MB:
        return warned("memory", line, f"a device that holds no block at all takes {_LEAST_MB:.0f} MB: see `sfl plan`")
    return passed("memory", line)


def check_plan(settings: DeviceSettings, model: str | Mapping[str, Any], lowest_cut: int = 1) -> tuple[Finding, ChosenCut | None]:
    """The cut in force, or the one that `auto` would take, against the memory that is free; None where none fits."""
    memory = available_memory()
    if memory is None or settings.run_on == "cuda":
        where = "this system does not say how much is free" if memory is None else "the plan counts a processor's memory"
        return skipped("memory", where), None
    asked = None if settings.cut == "auto" else settings.cut
    try:
        chosen = choose_cut_apart(model, PlanRequest.of(settings, lowest_cut), memory, asked)
    except SflError as error:
        return broke("memory", error), None
    if chosen is None:
        return warned("memory", f"{memory:.0f} MB can be had", "planning broke off, as the log says: see `sfl plan`"), None
    line = f"cut {chosen.cut} takes {chosen.device_mb:.0f} MB at most by the plan, {memory:.0f} MB can be had"
    if chosen.device_mb * (1 + MARGIN) > memory:
        return warned(
            "memory", line, "that is less than the plan's own error: lower the cut or micro_batch, or see `sfl plan`"
        ), chosen
    return passed("memory", line), chosen


def check_device_disks(settings: DeviceSettings, chosen: ChosenCut | None, provided: Path | None) -> Iterator[Finding]:
    """The disks of a device against what its plan takes there, if there is one: checkpoints, and its half of the model, unless
    that is in the folder `provided` already."""
    checkpoints_mb = 0.0 if chosen is None else _CHECKPOINTS * chosen.checkpoint_mb
    yield from check_disk("out", settings.out, _SPARE_MB + checkpoints_mb)
    if settings.model is not None:
        return
    cache = settings.cache or default_folder("device")
    if provided is not None and provided.is_dir():
        yield passed("disk of cache", f"the half is there, in {provided}")
    elif chosen is None:
        yield from check_disk("cache", cache, settings.cache_limit_mb, must=False)
    else:
        yield from check_disk("cache", cache, chosen.half_mb)


def check_disk(what: str, folder: Path, wanted_mb: float = _SPARE_MB, must: bool = True) -> Iterator[Finding]:
    """Whether `folder`, which need not exist, can be written and its disk has `wanted_mb` free; without `must` that is a wish."""
    name, folder = f"disk of {what}", folder.expanduser()
    there = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        yield failed(name, f"{there} cannot be written", f"choose another `{what}`, or give this user the right to write there")
        return
    free = shutil.disk_usage(there).free / 1e6
    line = f"{free:.0f} MB are free in {there.resolve()}"
    if free >= wanted_mb:
        yield passed(name, line)
    elif must:
        yield failed(name, line, f"make room: {wanted_mb:.0f} MB are needed")
    else:
        yield warned(name, line, f"up to {wanted_mb:.0f} MB may be used: make room, or lower that setting")
