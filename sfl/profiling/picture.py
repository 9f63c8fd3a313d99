"""A profile as a picture: memory over time with its phases, and the parts of the peak as a column beside."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sfl.profiling.result import Part, Profile
from sfl.profiling.table import headline, title

_INK, _MUTED, _GRID = "#1f1f1e", "#6b6a67", "#e4e3df"
_LINE, _SECOND, _LIMIT = "#1f1f1e", "#8a8985", "#e34948"
_PHASES = {
    "import": "#8a8985",
    "load": "#2a78d6",
    "tokenise": "#e87ba4",
    "forward": "#1baf7a",
    "wait": "#eda100",
    "backward": "#4a3aa7",
    "step": "#eb6834",
    "count": "#d6d4ce",
}
_PARTS = ("#b9b7b1", "#d6d4ce", "#2a78d6", "#8bb8ea", "#008300", "#1baf7a", "#9bdcc2", "#4a3aa7", "#9d92d6", "#eda100", "#f0a58f")
_LEAST_SHARE = 0.012  # of the column's height, for a part to have its name beside it


def draw(path: Path, profile: Profile) -> None:
    """Write the PNG."""
    import matplotlib  # slow to import, so only when a picture is drawn

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    top = 1.17 * max(profile.peak.rss_mb, min(profile.limit_mb or 0.0, 1.6 * profile.peak.rss_mb))
    with plt.rc_context({"font.size": 10, "font.family": "DejaVu Sans", "text.color": _INK, "axes.edgecolor": _GRID}):
        figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(11, 5.2), width_ratios=(4.4, 1.0), layout="constrained")
        _draw_phases(left, profile, top)
        _draw_lines(left, profile)
        _draw_peak(left, profile, top)
        _draw_parts(right, profile.parts, top, "parts of the peak" if profile.kind == "device" else "parts at the last look")
        if profile.limit_mb is not None and profile.limit_mb <= top:
            for axes in (left, right):
                axes.axhline(profile.limit_mb, color=_LIMIT, linewidth=1.2, linestyle=(0, (5, 3)), zorder=5)
            left.annotate(
                f"limit {profile.limit_mb:.0f} MB", (0.006, profile.limit_mb), xycoords=("axes fraction", "data"),
                xytext=(0, 3), textcoords="offset points", color=_LIMIT, fontsize=9, zorder=6,
            )  # fmt: skip
        figure.suptitle(title(profile), x=0.01, ha="left", fontsize=12)
        left.set_title(headline(profile), loc="left", fontsize=10, color=_MUTED)
        left.set_ylabel("MB", color=_MUTED)
        left.set_xlabel("seconds since the process began" if profile.kind == "device" else "seconds of watching", color=_MUTED)
        left.set_ylim(0, top)
        left.set_xlim(0, max(profile.seconds, 1e-3))
        left.grid(axis="y", color=_GRID, linewidth=0.8)
        left.set_axisbelow(True)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(color=_GRID, labelcolor=_MUTED, length=0)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _draw_phases(axes: Any, profile: Profile, top: float) -> None:
    """Coloured bands, pale behind the lines and strong in a strip below them; phases in the legend once."""
    for name in dict.fromkeys(span.phase for span in profile.spans):
        colour = _PHASES.get(name, _MUTED)
        stretches = [(span.start_s, span.end_s - span.start_s) for span in profile.spans if span.phase == name]
        axes.broken_barh(stretches, (0, top), facecolor=colour, alpha=0.13, linewidth=0, zorder=1)
        axes.broken_barh(stretches, (0, 0.022 * top), facecolor=colour, linewidth=0, zorder=3, label=name)


def _draw_lines(axes: Any, profile: Profile) -> None:
    for points, name, colour, width in ((profile.rss, "RSS", _LINE, 1.6), (profile.uss, "USS", _SECOND, 1.2)):
        if points:
            axes.plot(*zip(*points), color=colour, linewidth=width, label=name, zorder=4, drawstyle="default")
    if profile.rss or profile.spans:
        axes.legend(
            frameon=False, loc="upper left", ncols=12, fontsize=9, handlelength=1.1, handletextpad=0.4, columnspacing=1.0,
            bbox_to_anchor=(0, 1.0), borderaxespad=0.1,
        )  # fmt: skip


def _draw_peak(axes: Any, profile: Profile, top: float) -> None:
    peak = profile.peak
    late = peak.at_s > 0.6 * profile.seconds
    axes.plot(
        [peak.at_s], [peak.rss_mb], marker="o", markersize=6, color=_LIMIT, markeredgecolor="white", zorder=7, clip_on=False
    )
    words = f"{peak.rss_mb:.0f} MB" + (f", {peak.phase}" if peak.phase else "") + (f" of step {peak.step}" if peak.step else "")
    axes.annotate(
        words, (peak.at_s, peak.rss_mb), xytext=(-9 if late else 9, 7), textcoords="offset points",
        ha="right" if late else "left", fontsize=9, fontweight="bold", zorder=7,
    )  # fmt: skip


def _draw_parts(axes: Any, parts: Iterable[Part], top: float, heading: str) -> None:
    """One column; a part that is too small for a name beside it is drawn without."""
    bottom, free_from = 0.0, 0.0
    for part, colour in zip(parts, _PARTS):
        if part.mb is None or part.mb <= 0:
            continue
        axes.bar([0], [part.mb], width=0.7, bottom=[bottom], color=colour, edgecolor="white", linewidth=0.6, zorder=3)
        if part.mb > _LEAST_SHARE * top:
            at = max(bottom + part.mb / 2, free_from)
            axes.annotate(f"{part.name} {part.mb:.0f}", (0.4, at), va="center", fontsize=8.5, color=_INK, annotation_clip=False)
            free_from = at + 0.034 * top
        bottom += part.mb
    axes.set_xlim(-0.4, 2.2)
    axes.set_xticks([])
    axes.spines["left"].set_visible(False)
    axes.set_title(f"{heading}, MB", loc="left", fontsize=10, color=_MUTED)
