"""Fitting a device into its memory before anything large is imported: which cut, and what becomes of freed memory.

Nothing here needs torch, or NumPy before there is something to go on with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sfl.errors import MemoryShortError, SettingsError
from sfl.planning.apart import choose_cut_apart
from sfl.planning.available import available_memory
from sfl.planning.calibration import MARGIN, read_calibration
from sfl.planning.request import PlanRequest
from sfl.settings import DeviceSettings
from sfl.telemetry import log

PLENTY_MB = 2000.0  # with so much free, a device's half is not planned for and freed memory is kept for the next step


def fitted(settings: DeviceSettings, model: str | Mapping[str, Any], lowest_cut: int = 1) -> DeviceSettings:
    """The same settings with a cut that is a number and `tight_memory` decided.

    `model` is a folder, a hub id or a configuration as a tree; the edge serves cuts from `lowest_cut`. A cut that is set is
    checked where memory is short, so that the plan's numbers say what is too large, and not the kernel's end of the process.
    A run that goes on keeps its cut. Raises `SettingsError` with these numbers where it, or for `auto` any, does not fit.
    """
    if settings.cut == "auto" and (kept := _kept_cut(settings)) is not None:
        log.info("cut %d, that of the run which goes on", kept)
        settings = settings.model_copy(update={"cut": kept})
    memory = available_memory()
    if settings.run_on == "cuda":
        if settings.cut == "auto":
            raise SettingsError("the plan counts a processor's memory, not a GPU's: set the cut to a number instead of auto")
        memory = None
    short = memory is not None and memory < PLENTY_MB
    update: dict[str, Any] = {"tight_memory": short if settings.tight_memory is None else settings.tight_memory}
    if settings.cut == "auto" and memory is None:
        raise SettingsError("this system does not say how much memory is free: set the cut to a number instead of auto")
    if memory is not None and (short or settings.cut == "auto"):
        floor = read_calibration().floor_mb[settings.precision]
        if memory < (1 - MARGIN) * floor:  # said at once, as planning itself takes as much
            raise MemoryShortError(f"no cut fits {memory:.0f} MB: a device that holds no block at all takes {floor:.0f} MB")
        asked = None if settings.cut == "auto" else settings.cut
        chosen = choose_cut_apart(model, PlanRequest.of(settings, lowest_cut), memory, asked)
        if chosen is not None:
            log.info("cut %d: about %.0f MB planned, %.0f MB are free", chosen.cut, chosen.device_mb, memory)
            update["cut"] = chosen.cut
    return settings.model_copy(update=update)


def _kept_cut(settings: DeviceSettings) -> int | None:
    from sfl.device.checkpoints import FOLDER, kept_cut  # brings NumPy along, which only a run that goes on needs here

    return kept_cut(settings.out / FOLDER)
