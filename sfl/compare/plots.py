"""The comparison as pictures: accuracy and loss of the versions over bytes, steps and time, and the last one's over cut depth."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sfl.compare.outcome import Outcome, Point, Scores
from sfl.compare.table import Outcomes

_PALETTE = ("#2a78d6", "#e34948", "#1baf7a", "#eda100", "#4a3aa7", "#e87ba4", "#008300", "#eb6834")
_LINES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))  # for the variants after the last colour
_INK, _MUTED, _GRID = "#1f1f1e", "#6b6a67", "#e4e3df"
_GRID_POINTS = 200  # on which the curves of several seeds are averaged
_MOST_BANDS = 5  # variants; more would hide each other


@dataclass(frozen=True)
class Axis:
    """What the versions' figures are drawn over. `sent` is whether it is something that centralised training has not."""

    name: str
    title: str
    place: Callable[[Point], float]
    sent: bool = False


AXES = (
    Axis("bytes", "MB uploaded to the federation server", lambda point: point.bytes_received / 1e6, sent=True),
    Axis("steps", "local steps of all devices", lambda point: point.steps),
    Axis("time", "simulated seconds, devices side by side", lambda point: point.simulated_s, sent=True),
)


def draw(out: Path, outcomes: Outcomes, title: str) -> list[Path]:
    """Write a PNG for each axis that has something to show, `accuracy_over_bytes.png` and so on; the files."""
    import matplotlib  # slow to import, so only when a picture is drawn

    matplotlib.use("Agg")
    written = []
    for axis in AXES:
        if any(len(run.curve) > 1 and not (axis.sent and _nothing_sent(run)) for run in _runs(outcomes)):
            written.append(out / f"accuracy_over_{axis.name}.png")
            _draw_curves(written[-1], outcomes, axis, title)
    by_cut = _by_cut(outcomes)
    if len(by_cut) > 1:
        written.append(out / "accuracy_over_cut.png")
        _draw_cuts(written[-1], by_cut, title)
    return written


def averaged(places: Sequence[Sequence[float]], values: Sequence[Sequence[float]]) -> tuple[Any, Any, Any, Any]:
    """Curves of several seeds on common places: these, and there the mean, the least and the greatest of the values.

    Between its points a curve is straight; it is averaged only where all of them are.
    """
    start, end = max(line[0] for line in places), min(line[-1] for line in places)
    if end <= start:
        start, end = min(line[0] for line in places), max(line[-1] for line in places)
    grid = np.linspace(start, end, _GRID_POINTS)
    found = np.array([np.interp(grid, place, value) for place, value in zip(places, values, strict=True)])
    return grid, found.mean(axis=0), found.min(axis=0), found.max(axis=0)


def _draw_curves(path: Path, outcomes: Outcomes, axis: Axis, title: str) -> None:
    """Accuracy above, loss below; the mean over seeds as a line, from the least to the greatest as a band."""
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": _INK, "axes.edgecolor": _GRID}):
        figure, panels = plt.subplots(2, 1, sharex=True, figsize=(9, 6.4), height_ratios=(3, 2), layout="constrained")
        for index, (name, by_seed) in enumerate(outcomes.items()):
            runs = [run for run in by_seed.values() if run.curve]
            if not runs:
                continue
            style = {"color": _PALETTE[index % len(_PALETTE)], "linestyle": _LINES[index // len(_PALETTE) % len(_LINES)]}
            for axes, figure_of in zip(panels, (_accuracy, _loss), strict=True):
                if axis.sent and _nothing_sent(runs[0]):
                    level = statistics.mean(figure_of(run.central) for run in runs)
                    axes.axhline(level, color=_MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label=name, zorder=2)
                else:
                    _draw_curve(axes, runs, axis, figure_of, name, style, band=len(outcomes) <= _MOST_BANDS)
        _finish(panels[0], "accuracy")
        _finish(panels[1], "loss")
        panels[1].set_ylim(bottom=0, top=_top_of_losses(outcomes))
        panels[1].set_xlabel(axis.title, color=_MUTED)
        _entitle(figure, panels[0], f"Versions on the test examples, over {axis.title}", title)
        lines = panels[0].get_legend_handles_labels()
        figure.legend(*lines, frameon=False, loc="outside lower left", ncols=4, fontsize=9, handlelength=2.8)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_curve(
    axes: Any,
    runs: Sequence[Outcome],
    axis: Axis,
    figure_of: Callable[[Scores], float],
    name: str,
    style: Mapping[str, Any],
    band: bool,
) -> None:
    places = [[axis.place(point) for point in run.curve] for run in runs]
    values = [[figure_of(point.scores) for point in run.curve] for run in runs]
    if len(runs) == 1:
        axes.plot(places[0], values[0], linewidth=2, marker="o", markersize=3.5, label=name, zorder=3, **style)
        return
    grid, middle, least, greatest = averaged(places, values)
    if band:
        axes.fill_between(grid, least, greatest, color=style["color"], alpha=0.13, linewidth=0, zorder=1)
    axes.plot(grid, middle, linewidth=2, label=name, zorder=3, **style)


def _draw_cuts(path: Path, by_cut: Mapping[int, Mapping[str, Sequence[float]]], title: str) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": _INK, "axes.edgecolor": _GRID}):
        figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
        strategies = list(dict.fromkeys(name for found in by_cut.values() for name in found))
        for index, strategy in enumerate(strategies):
            cuts = [cut for cut in sorted(by_cut) if strategy in by_cut[cut]]
            means = [statistics.mean(by_cut[cut][strategy]) for cut in cuts]
            least, greatest = ([summary(by_cut[cut][strategy]) for cut in cuts] for summary in (min, max))
            spread = [[mean - low for mean, low in zip(means, least)], [high - mean for mean, high in zip(means, greatest)]]
            colour = _PALETTE[index % len(_PALETTE)]
            axes.errorbar(cuts, means, yerr=spread, color=colour, marker="o", linewidth=2, capsize=3, label=strategy)
        _finish(axes, "accuracy")
        _entitle(figure, axes, "Last version on the test examples, by cut", title)
        axes.set_xlabel("cut layer of all devices", color=_MUTED)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _entitle(figure: Any, axes: Any, heading: str, title: str) -> None:
    width = int(14 * figure.get_figwidth())  # in characters of the smaller line
    figure.suptitle(heading, x=0.01, ha="left", fontsize=12, color=_INK)
    axes.set_title(textwrap.fill(title, width), loc="left", fontsize=9, color=_MUTED)


def _finish(axes: Any, label: str) -> None:
    axes.set_ylabel(label, color=_MUTED)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color=_GRID, labelcolor=_MUTED, length=0)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _by_cut(outcomes: Outcomes) -> dict[int, dict[str, list[float]]]:
    """Accuracies of runs without attackers whose devices all have one cut, by cut and strategy."""
    found: dict[int, dict[str, list[float]]] = {}
    for run in _runs(outcomes):
        cuts = {device.cut for device in run.devices}
        if len(cuts) == 1 and len(run.honest) == len(run.devices) and not _nothing_sent(run):
            found.setdefault(cuts.pop(), {}).setdefault(run.strategy, []).append(run.central.accuracy)
    return found


def _top_of_losses(outcomes: Outcomes) -> float:
    """Room for all last losses and for those at the start, not for what a strategy that fails rises to in between."""
    ends = [point.scores.loss for run in _runs(outcomes) for point in (*run.curve[:1], *run.curve[-1:])]
    return 1.15 * max(ends, default=1.0)


def _accuracy(found: Scores) -> float:
    return found.accuracy


def _loss(found: Scores) -> float:
    return found.loss


def _nothing_sent(run: Outcome) -> bool:
    return run.fed_received is None


def _runs(outcomes: Outcomes) -> list[Outcome]:
    return [run for by_seed in outcomes.values() for run in by_seed.values()]
