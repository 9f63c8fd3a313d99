"""Which cut to take.

What a device's owner wants first is that it fits, with a margin; then that a step takes as little time as may be; and where
a deeper cut costs next to no time, the deeper one, as it shows the edge less of the data and leaves it less to do. So:

1. the cuts whose predicted peak leaves `MARGIN` of it free; if there is none, those that fit at all;
2. of these the fastest step, and every cut whose step takes at most `TIE` of that time longer;
3. of these the deepest.

Where the device's speed is not known, time is counted in operations, the edge's at a tenth: the link's time, which no cut
changes by much, is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from transformers import PretrainedConfig

from sfl.errors import MemoryShortError
from sfl.model.cut import check_cut
from sfl.planning.calibration import MARGIN, Calibration
from sfl.planning.plan import CutPlan, Plan, make_plan
from sfl.planning.request import PlanRequest
from sfl.planning.speeds import EDGE_OVER_DEVICE
from sfl.telemetry import log

TIE = 0.10

Fit = Literal["yes", "barely", "no"]


@dataclass(frozen=True)
class Recommendation:
    """The cut to take, how it fits, and a sentence that says why; `cut` is None where none fits."""

    cut: int | None
    fits: Fit | None
    reason: str


def fit(plan: CutPlan, memory_mb: float | None) -> Fit | None:
    """Whether the device's peak fits `memory_mb`: "barely" without the margin. None where the memory is not known."""
    if memory_mb is None:
        return None
    if plan.device_mb > memory_mb:
        return "no"
    return "yes" if plan.device_mb * (1 + MARGIN) <= memory_mb else "barely"


def recommend(plan: Plan, memory_mb: float | None) -> Recommendation:
    """The cut that the rule at the top gives."""
    fits = {entry.cut: fit(entry, memory_mb) for entry in plan.cuts}
    if all(found == "no" for found in fits.values()):
        least = min(plan.cuts, key=lambda entry: entry.device_mb)
        reason = f"no cut fits {memory_mb:.0f} MB: the least, cut {least.cut}, needs {least.device_mb:.0f} MB"
        return Recommendation(None, "no", reason)
    wide = [entry for entry in plan.cuts if fits[entry.cut] in ("yes", None)]
    candidates = wide or [entry for entry in plan.cuts if fits[entry.cut] == "barely"]
    fastest = min(candidates, key=_cost)
    chosen = max((entry for entry in candidates if _cost(entry) <= (1 + TIE) * _cost(fastest)), key=lambda entry: entry.cut)
    return Recommendation(chosen.cut, fits[chosen.cut], _reason(chosen, fastest, candidates, memory_mb, bool(wide), plan))


def choose_cut(
    config: PretrainedConfig, request: PlanRequest, memory_mb: float, calibration: Calibration | None = None
) -> CutPlan:
    """The recommended cut for a device with so much memory.

    Raises `SettingsError` with the planner's numbers where no cut fits; otherwise as `make_plan` does.
    """
    plan = make_plan(config, request, calibration)
    found = recommend(plan, memory_mb)
    if found.cut is None:
        least = min(plan.cuts, key=lambda entry: entry.device_mb)
        raise MemoryShortError(f"{found.reason} ({_parts(least)}). {_ways_out(config, request, least, memory_mb, calibration)}")
    chosen = next(entry for entry in plan.cuts if entry.cut == found.cut)
    if found.fits == "barely":
        log.warning("%s", found.reason)
    return chosen


def require_fits(
    config: PretrainedConfig, request: PlanRequest, cut: int, memory_mb: float, calibration: Calibration | None = None
) -> CutPlan:
    """The plan of a cut that was asked for, with a warning where it fits barely or perhaps not.

    Raises `SettingsError` with the planner's numbers where the memory is short by more than `MARGIN`, the plan's own error.
    """
    check_cut(config, cut)
    plan = make_plan(config, replace(request, lowest_cut=min(cut, request.lowest_cut)), calibration)
    chosen = next(entry for entry in plan.cuts if entry.cut == cut)
    if (1 - MARGIN) * chosen.device_mb > memory_mb:
        shallower = [entry.cut for entry in plan.cuts if fit(entry, memory_mb) != "no"]
        other = f"Cuts up to {max(shallower)} fit. " if shallower else ""
        raise MemoryShortError(
            f"cut {cut} does not fit {memory_mb:.0f} MB: it needs {chosen.device_mb:.0f} MB ({_parts(chosen)}). {other}"
            f"{_ways_out(config, request, chosen, memory_mb, calibration)}"
        )
    if fit(chosen, memory_mb) != "yes":
        log.warning("cut %d is planned to take about %.0f MB, %.0f MB are free", cut, chosen.device_mb, memory_mb)
    return chosen


def _cost(entry: CutPlan) -> float:
    return entry.time.step if entry.time is not None else entry.device_flops + entry.edge_flops / EDGE_OVER_DEVICE


def _parts(entry: CutPlan) -> str:
    device = entry.device
    return (
        f"process {device.floor:.0f}, weights {device.weights:.0f}, adapter {device.adapter:.0f}, activations"
        f" {device.activations:.0f}, temporary {device.temporary:.0f}, allocator {device.slack:.0f}"
    )


def _ways_out(
    config: PretrainedConfig, request: PlanRequest, entry: CutPlan, memory_mb: float, calibration: Calibration | None
) -> str:
    """What would make `entry` smaller, and by how much."""
    changes: dict[str, PlanRequest] = {}
    if request.micro_batch != 1 and request.batch_size > 1:
        changes["micro_batch 1"] = replace(request, micro_batch=1)
    if request.precision in ("fp32", "bf16"):
        changes["precision int8"] = replace(request, precision="int8")
    if not request.checkpointing:
        changes["checkpointing"] = replace(request, checkpointing=True)
    if len(changes) > 1:
        changes["all of these"] = replace(
            request,
            micro_batch=1,
            checkpointing=True,
            precision="int8" if "precision int8" in changes else request.precision,
        )
    found = []
    for name, changed in changes.items():
        other = next(each for each in make_plan(config, changed, calibration).cuts if each.cut == entry.cut)
        if other.device_mb < entry.device_mb:
            found.append(f"{other.device_mb:.0f} MB with {name}{' (fits)' if other.device_mb <= memory_mb else ''}")
    return f"Cut {entry.cut} would take {', '.join(found)}" if found else "Take a smaller model, batch or length of texts"


def _reason(chosen: CutPlan, fastest: CutPlan, candidates: list[CutPlan], memory_mb: float | None, wide: bool, plan: Plan) -> str:
    if memory_mb is None:
        room, such = "no memory limit is known", "of this model"
    elif wide:
        room = f"its {chosen.device_mb:.0f} MB leave {memory_mb - chosen.device_mb:.0f} of {memory_mb:.0f} MB free"
        such = f"with a margin of {MARGIN:.0%}"
    else:
        room = f"its {chosen.device_mb:.0f} of {memory_mb:.0f} MB fit, but no cut leaves a margin of {MARGIN:.0%}"
        such = "that fits"
    if len(candidates) == 1:
        why = f"it is the only cut {such}"
    elif chosen.time is not None and fastest.time is not None:
        why = f"no cut {such} has a shorter step than {fastest.time.step:.2f} s"
        if chosen is not fastest:
            why += f" (cut {fastest.cut}), and this deeper one takes {chosen.time.step:.2f} s and shows the edge less"
    else:
        why = f"no cut {such} asks less of the device"
        if chosen is not fastest:
            why = f"it asks hardly more of the device than cut {fastest.cut} and shows the edge less"
    assumed = f" (assumed: {', '.join(plan.speeds.assumed)})" if plan.speeds.assumed else ""
    return f"cut {chosen.cut}: {room}; {why}{assumed}"
