"""A plan as it is shown: a table for each precision, or one JSON object."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sfl.planning.calibration import MARGIN
from sfl.planning.choice import fit, recommend
from sfl.planning.plan import CutPlan, Plan

if TYPE_CHECKING:
    from rich.table import Table


class Report:
    """Plans of one model, the same but for the precision, the most exact one first.

    `memory_mb` is what the device has, None where nobody knows; `given` says that it was named and not looked up.
    """

    def __init__(self, model: str, plans: Sequence[Plan], memory_mb: float | None, given: bool) -> None:
        self._model = model
        self._plans = plans
        self._memory = memory_mb
        self._given = given
        self._found = [recommend(plan, memory_mb) for plan in plans]

    def as_dict(self) -> dict[str, Any]:
        """`model`, `memory_mb`, `memory_given`, `margin`, `calibration` (source, stale, floor_mb, gflops), `plans` and
        `recommended` (precision and cut, None where nothing fits).

        Each of `plans` has `precision`, `request`, `speeds`, `cuts`, `recommended` (a cut or None) and `reason`; each of its
        cuts what `CutPlan.as_dict` gives, and `fits`: yes, barely (less than the margin is left), no, or None.
        """
        calibration = self._plans[0].calibration
        return {
            "model": self._model,
            "memory_mb": None if self._memory is None else round(self._memory, 1),
            "memory_given": self._given,
            "margin": MARGIN,
            "calibration": {**asdict(calibration), "stale": calibration.stale},
            "plans": [
                {
                    "precision": plan.request.precision,
                    "request": {**asdict(plan.request), "compute": plan.request.compute_format},
                    "speeds": asdict(plan.speeds),
                    "cuts": [{**cut.as_dict(), "fits": fit(cut, self._memory)} for cut in plan.cuts],
                    "recommended": found.cut,
                    "reason": found.reason,
                }
                for plan, found in zip(self._plans, self._found)
            ],
            "recommended": self._best(),
        }

    def shown(self) -> Iterator[str | Table]:
        """What a terminal shows, one after the other."""
        memory = "not known" if self._memory is None else f"{self._memory:.0f} MB {'given' if self._given else 'free here'}"
        request, calibration = self._plans[0].request, self._plans[0].calibration
        yield (
            f"{self._model}: {request.task}, batch {request.batch_size}x{request.max_length}"
            f"{f' in micro-batches of {request.micro_batch}' if request.micro_batch else ''}"
            f"{', checkpointing' if request.checkpointing else ''}, LoRA rank {request.lora.rank}; memory {memory}"
        )
        for plan, found in zip(self._plans, self._found):
            yield self._table(plan, found.cut)
            yield f"recommended with {plan.request.precision}: {found.reason}"
        best = self._best()
        if any(len(self._rows(plan, found.cut)) < len(plan.cuts) for plan, found in zip(self._plans, self._found)):
            yield (
                "of each precision: the first and the last cut, the recommended one, and the deepest that fits with the next;"
                " all cuts with a single --precision, or --json"
            )
        if len(self._plans) > 1:
            margin = f" with a margin of {MARGIN:.0%}" if any(found.fits == "yes" for found in self._found) else ""
            yield f"most exact that fits{margin}: {best['precision']} at cut {best['cut']}" if best else "nothing fits"
        yield f"constants: {calibration.source}{'' if calibration.versions else '; sfl plan --calibrate measures this machine'}"
        if calibration.stale:
            yield f"the calibration is out of date: {calibration.stale}; run sfl plan --calibrate again"

    def _best(self) -> dict[str, Any] | None:
        """The most exact precision in which a cut fits with the margin; where there is none, in which one fits at all."""
        fitting = [(plan, found) for plan, found in zip(self._plans, self._found) if found.cut is not None]
        wide = [(plan, found) for plan, found in fitting if found.fits != "barely"]
        return next(({"precision": plan.request.precision, "cut": found.cut} for plan, found in wide or fitting), None)

    def _rows(self, plan: Plan, recommended: int | None) -> list[CutPlan]:
        """Every cut, or where several precisions are shown those that tell them apart."""
        if len(self._plans) == 1:
            return list(plan.cuts)
        deepest = max((cut.cut for cut in plan.cuts if fit(cut, self._memory) != "no"), default=plan.cuts[0].cut)
        telling = {plan.cuts[0].cut, recommended, deepest, deepest + 1, plan.cuts[-1].cut}
        return [cut for cut in plan.cuts if cut.cut in telling]

    def _table(self, plan: Plan, recommended: int | None) -> Table:
        from rich.table import Table

        request = plan.request
        title = f"{request.precision} base, {request.compute_format} activations; edge for {request.devices}; MB of 10^6 bytes"
        table = Table(title=title, header_style="bold", title_justify="left")
        for name in _COLUMNS:
            table.add_column(name, justify="right")
        for cut in self._rows(plan, recommended):
            fits = fit(cut, self._memory)
            style = "bold green" if cut.cut == recommended else {"no": "dim", "barely": "yellow"}.get(fits or "")
            table.add_row(f"{'> ' if cut.cut == recommended else ''}{cut.cut}", *_row(cut), fits or "-", *_rest(cut), style=style)
        return table


_COLUMNS = (
    "cut",
    "device",
    "process",
    "weights",
    "adapter",
    "activ.",
    "temp.",
    "slack",
    "fits",
    "edge",
    "up",
    "down",
    "GFLOP",
    "at edge",
    "step s",
)


def _row(cut: CutPlan) -> Iterator[str]:
    device = cut.device
    parts = (device.floor, device.weights, device.adapter, device.activations, device.temporary, device.slack)
    return (f"{value:.0f}" if value >= 10 else f"{value:.1f}" for value in (cut.device_mb, *parts))


def _rest(cut: CutPlan) -> Iterator[str]:
    yield f"{cut.edge_mb:.0f}"
    yield from (f"{count / 1e6:.2f}" for count in (cut.bytes_up, cut.bytes_down))
    yield from (f"{count / 1e9:.1f}" for count in (cut.device_flops, cut.edge_flops))
    yield "-" if cut.time is None else f"{cut.time.step:.2f}"
