"""A finished run for the eye: the final table and the picture of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

_PALETTE = ("#2a78d6", "#1baf7a", "#eda100", "#4a3aa7", "#e34948", "#e87ba4", "#008300", "#eb6834")
_BYTES = "sent and received: the whole run, training and then each device's test of its adapter"
_INK, _MUTED, _GRID = "#1f1f1e", "#6b6a67", "#e4e3df"
_MANY = len(_PALETTE)  # devices beyond this many share one colour and one legend entry


def summary_table(summary: Mapping[str, Any]) -> Table:
    """The table of `OUT/summary.json`: a row per device, then the central adapter beside them, then the servers."""
    scored = summary["task"] == "classification"
    fed = summary["fed"]
    table = Table(title=f"{summary['strategy']}, {summary['wall_s']:.0f} s", title_justify="left", header_style="bold")
    table.caption, table.caption_justify = _BYTES, "left"
    for name in ("", "cut", "steps", "examples", "uploads", "sent", "received", "peak memory", "test loss"):
        table.add_column(name, justify="left" if not name else "right")
    for name in ("accuracy", "macro-F1") if scored else ():
        table.add_column(name, justify="right")

    def scores(row: Mapping[str, Any]) -> list[str]:
        return [_figure(row[name]) for name in (("loss", "accuracy", "f1_macro") if scored else ("loss",))]

    for row in summary["devices"]:
        counts = [str(row[name]) for name in ("cut", "steps", "examples", "submissions")]
        table.add_row(row["name"], *counts, *_machine(row), *scores(row))
    table.add_section()
    for row in summary["edges"]:
        table.add_row(row["name"], "", str(row["steps"]), "", "", *_machine(row))
    table.add_row("federation server", "", "", "", str(fed["submissions"]), *_machine(fed))
    table.add_section()
    table.add_row(f"central adapter v{fed['version']}", *[""] * 7, *scores(summary["central"]), style="bold")
    return table


@dataclass(frozen=True)
class Curve:
    """One device's training: `losses[i]` at `steps[i]`, and the (step, version) of each global version it adopted."""

    name: str
    steps: Sequence[int]
    losses: Sequence[float]
    adopted: Sequence[tuple[int, int]]

    @classmethod
    def from_events(cls, name: str, events: Sequence[Mapping[str, Any]]) -> Curve:
        """From the device's metrics."""
        steps = [event for event in events if event["event"] == "step"]
        adopted = [(int(event["step"]), int(event["version"])) for event in events if event["event"] == "adopt"]
        return cls(name, [int(event["step"]) for event in steps], [float(event["loss"]) for event in steps], adopted)


def draw_losses(path: Path, curves: Sequence[Curve], title: str) -> None:
    """Write a PNG: each device's loss over its own steps, as it was and smoothed, and below when it took which global version."""
    import matplotlib  # slow to import, so only when a picture is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    rows = 0.28 * min(len(curves), 2 * _MANY) + 0.15
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": _INK, "axes.edgecolor": _GRID}):
        figure, (top, bottom) = plt.subplots(
            2, 1, sharex=True, figsize=(9, 4.4 + rows), height_ratios=(4.0, rows), layout="constrained"
        )
        for index, curve in enumerate(curves):
            colour = _PALETTE[index] if len(curves) <= _MANY else _PALETTE[0]
            smooth = smoothed(curve.losses)
            top.plot(curve.steps, curve.losses, color=colour, alpha=0.18, linewidth=1)
            label = curve.name if len(curves) <= _MANY else (f"{len(curves)} devices" if index == 0 else None)
            top.plot(curve.steps, smooth, color=colour, linewidth=2, alpha=1 if len(curves) <= _MANY else 0.5, label=label)
            _draw_versions(bottom, index, curve, colour, numbered=len(curves) <= _MANY)
        top.set_title(title, loc="left", fontsize=12, color=_INK)
        top.set_ylabel("training loss", color=_MUTED)
        top.set_ylim(bottom=0)
        top.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=4)
        bottom.set_xlabel("local step", color=_MUTED)
        bottom.set_yticks(range(len(curves)), [curve.name for curve in curves] if len(curves) <= _MANY else [""] * len(curves))
        bottom.set_ylim(len(curves) - 0.5, -0.5)
        bottom.set_title("global versions taken", loc="left", fontsize=10, color=_MUTED)
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color=_GRID, labelcolor=_MUTED, length=0)
        top.grid(axis="y", color=_GRID, linewidth=0.8)
        top.set_axisbelow(True)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def smoothed(values: Sequence[float]) -> npt.NDArray[np.float64]:
    """Centred moving mean over about a tenth of the values (3 at least), over fewer towards both ends; same length."""
    half = max(1, len(values) // 20)
    array = np.asarray(values, dtype=np.float64)
    return np.array([array[max(0, i - half) : i + half + 1].mean() for i in range(len(array))])


def _draw_versions(axes: Any, index: int, curve: Curve, colour: str, numbered: bool) -> None:
    """One line of a device's life, with a mark where it adopted a version."""
    if curve.steps:
        axes.plot([curve.steps[0], curve.steps[-1]], [index, index], color=_GRID, linewidth=1, zorder=1)
    room = 0.025 * max(len(curve.steps), 1)  # steps that a number takes
    for place, (step, version) in enumerate(curve.adopted):
        last_for_a_while = place + 1 == len(curve.adopted) or curve.adopted[place + 1][0] - step >= room
        size = 11 if numbered and last_for_a_while else 4
        axes.plot([step], [index], marker="o", markersize=size, color=colour, markeredgecolor="white", zorder=2)
        if numbered and last_for_a_while:
            axes.annotate(
                str(version),
                (step, index),
                ha="center",
                va="center_baseline",
                fontsize=7,
                color="white",
                fontweight="bold",
                zorder=3,
            )


def _machine(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['bytes_sent'] / 1e6:.1f} MB", f"{row['bytes_received'] / 1e6:.1f} MB", f"{row['peak_rss_mb']:.0f} MB"]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
