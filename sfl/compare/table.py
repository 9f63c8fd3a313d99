"""The comparison as tables: how good, at what cost, for whom. The same rows as text, as Markdown and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from rich.cells import cell_len
from rich.table import Table

from sfl.compare.outcome import DeviceOutcome, Outcome, Point

_BESIDE_A_CELL = 3  # characters: a line, and a blank on either side

Outcomes = Mapping[str, Mapping[int, Outcome]]  # by variant, then by seed


@dataclass(frozen=True)
class Column:
    """A figure of a run, None where it has none. `digits` follow the point; `spread` shows the least and the greatest over seeds
    beside the mean. A column is `shown` always, where some run has the figure, or where some run has more than 0 of it."""

    name: str
    title: str
    figure: Callable[[Outcome], float | None]
    digits: int
    spread: bool = True
    shown: Literal["always", "if known", "if above 0"] = "always"

    def is_shown(self, runs: Sequence[Outcome]) -> bool:
        """Whether it is among the columns of a table of these runs."""
        figures = [figure for figure in map(self.figure, runs) if figure is not None]
        return self.shown == "always" or any(self.shown == "if known" or figure > 0 for figure in figures)


def _own(outcome: Outcome, figure: str) -> float | None:
    """The mean over honest devices of a figure of their own adapters, weighted by their test examples."""
    found = [(getattr(device.own, figure), device.test) for device in outcome.honest if device.own is not None]
    return sum(value * count for value, count in found) / sum(count for _, count in found) if found else None


def _over_devices(outcome: Outcome, summary: Callable[[Sequence[float]], float]) -> float | None:
    """A summary of what the honest devices' users get: the accuracy of the last version on each one's own test examples."""
    return summary([device.central_accuracy for device in outcome.honest])


def _sent(outcome: Outcome, count: int) -> int | None:
    """`count`, None for centralised training, where nothing is sent."""
    return None if outcome.submissions is None else count


def _mega(value: int | None) -> float | None:
    return None if value is None else value / 1e6


QUALITY = (
    Column("accuracy", "accuracy", lambda run: run.central.accuracy, 3),
    Column("f1_macro", "macro-F1", lambda run: run.central.f1_macro, 3),
    Column("loss", "loss", lambda run: run.central.loss, 3),
    Column("calibration_error", "ECE", lambda run: run.central.calibration_error, 3, False),
    Column("device_accuracy", "devices' accuracy", lambda run: _own(run, "accuracy"), 3),
    Column("device_f1_macro", "devices' macro-F1", lambda run: _own(run, "f1_macro"), 3),
    Column("device_loss", "devices' loss", lambda run: _own(run, "loss"), 3, False),
    Column("fairness_sd", "sd over devices", lambda run: _over_devices(run, statistics.pstdev), 3, False),
    Column("worst_device", "worst device", lambda run: _over_devices(run, min), 3, False),
    Column("backdoor", "backdoor", lambda run: run.backdoor, 3, shown="if known"),
    Column("without_trigger", "without trigger", lambda run: run.without_trigger, 3, False, "if known"),
    Column("epsilon", "epsilon", lambda run: run.epsilon, 2, False, "if known"),
)
COST = (
    Column("fed_received_mb", "MB up", lambda run: _mega(run.fed_received), 1),
    Column("fed_sent_mb", "MB down", lambda run: _mega(run.fed_sent), 1),
    Column("edge_received_mb", "MB to edge", lambda run: _mega(run.edge_received), 1, False),
    Column("edge_sent_mb", "MB from edge", lambda run: _mega(run.edge_sent), 1, False),
    Column("submissions", "submissions", lambda run: run.submissions, 0, False),
    Column("versions", "versions", lambda run: run.versions, 0, False),
    Column("refused", "refused", lambda run: _sent(run, run.refused), 1, False, "if above 0"),
    Column("lost", "devices lost", lambda run: _sent(run, run.lost), 1, False, "if above 0"),
    Column("latency_ms", "ms a text", lambda run: 1e3 * run.latency_s, 1, False),
    Column("requests_per_minute", "requests/min", lambda run: 60 / run.latency_s, 0, False),
    Column(
        "split_latency_ms", "ms split", lambda run: None if run.split_latency_s is None else 1e3 * run.split_latency_s, 1, False
    ),
    Column(
        "split_requests_per_minute",
        "requests/min split",
        lambda run: None if run.split_latency_s is None else 60 / run.split_latency_s,
        0,
        False,
    ),
    Column("simulated_s", "simulated s", lambda run: run.simulated_s, 0, False),
    Column("wall_s", "s here", lambda run: run.wall_s, 0, False),
)


def cost(target: float | None) -> tuple[Column, ...]:
    """The columns of cost, with what it took to reach an accuracy of `target`."""
    if target is None:
        return COST
    reached = partial(_reached, target=target)
    return (
        *COST,
        Column("target_s", f"simulated s to {target:g}", lambda run: _if(reached(run), lambda point: point.simulated_s), 0),
        Column("target_mb", f"MB up, to {target:g}", lambda run: _if(reached(run), lambda point: point.bytes_received / 1e6), 1),
    )


def _reached(outcome: Outcome, target: float) -> Point | None:
    """The first version on the way that was so accurate."""
    return next((point for point in outcome.curve if point.scores.accuracy >= target), None)


def _if(point: Point | None, figure: Callable[[Point], float]) -> float | None:
    return None if point is None else figure(point)


NOTES = (
    "Mean over the seeds, in brackets the least and the greatest. Accuracy, macro-F1, loss and ECE (expected calibration error,"
    " 15 bins) are those of the last version on the pooled test examples, with the uncut fp32 model. Devices: each one's own"
    " adapter on its own test examples, through the split; the mean weighted by their number, attackers left out. Sd and worst"
    " device: the last version's accuracy on each device's test examples. Backdoor: the share of texts of other labels that are"
    " taken for the target's, with the trigger and without.",
    "MB are 10^6 bytes of frames: up and down at the federation server, to and from the edge for its devices. ms a text: the"
    " mean time of classifying one text, uncut and through device and edge in one process. Simulated s: until the last version,"
    " with the devices side by side; s here: all of them computing in turn. [1 of 3]: that many runs have the figure.",
)


def columns(outcomes: Outcomes, all_columns: Sequence[Column]) -> list[Column]:
    """Those that are shown for these runs."""
    runs = [run for by_seed in outcomes.values() for run in by_seed.values()]
    return [column for column in all_columns if column.is_shown(runs)]


def cell(column: Column, runs: Sequence[Outcome]) -> str:
    """The mean over the runs that have this figure, with its spread over several if the column shows it; `-` for none.

    Where some have it and some have not, how many.
    """
    values = [value for value in map(column.figure, runs) if value is not None]
    if not values:
        return "-"
    text = f"{statistics.mean(values):.{column.digits}f}"
    if column.spread and len(values) > 1:
        text += f" ({min(values):.{column.digits}f}-{max(values):.{column.digits}f})"
    if len(values) < len(runs):
        text += f" [{len(values)} of {len(runs)}]"
    return text


def rows(outcomes: Outcomes, shown: Sequence[Column]) -> list[list[str]]:
    """A row a variant: its name, its number of seeds, and a cell a column."""
    return [
        [name, str(len(by_seed)), *(cell(column, list(by_seed.values())) for column in shown)]
        for name, by_seed in outcomes.items()
    ]


def as_text(outcomes: Outcomes, target: float | None = None, width: int = 240) -> list[Table]:
    """The tables for a screen of so many characters: columns that do not fit come below, beside the names again."""
    found = []
    for title, all_columns in (("how good", QUALITY), ("at what cost", cost(target))):
        shown = columns(outcomes, all_columns)
        lines = [["", "seeds", *(column.title for column in shown)], *rows(outcomes, shown)]
        for part, places in enumerate(_parts(lines, width)):
            table = Table(title=f"{title}, continued" if part else title, title_justify="left", header_style="bold")
            for place in places:
                table.add_column(lines[0][place], justify="right" if place else "left")
            for line in lines[1:]:
                table.add_row(*(line[place] for place in places))
            found.append(table)
    return found


def _parts(lines: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The places of the columns of each table that fits `width`: the first in all of them, the others in turn."""
    room = [max(cell_len(line[place]) for line in lines) + _BESIDE_A_CELL for place in range(len(lines[0]))]
    parts = [[0]]
    for place in range(1, len(room)):
        if len(parts[-1]) > 1 and 1 + sum(room[each] for each in (*parts[-1], place)) > width:
            parts.append([0])
        parts[-1].append(place)
    return parts


def as_markdown(outcomes: Outcomes, target: float | None = None) -> str:
    """The tables with what their columns mean, and one of each device's accuracy."""
    parts = []
    for all_columns, note in zip((QUALITY, cost(target)), NOTES, strict=True):
        shown = columns(outcomes, all_columns)
        parts.append(_markdown(["", "seeds", *(column.title for column in shown)], rows(outcomes, shown)))
        parts.append(note)
    names = _device_names(outcomes)
    parts.append(_markdown(["last version on", *names], [_of_devices(name, runs, names) for name, runs in outcomes.items()]))
    parts.append("Accuracy of the last version on each device's test examples, mean over the seeds; * where it attacks in some.")
    return "\n\n".join(parts) + "\n"


def as_json(outcomes: Outcomes, target: float | None = None) -> list[dict[str, Any]]:
    """A row a variant: each column's mean, least and greatest, and the runs in full."""
    found = []
    for name, by_seed in outcomes.items():
        figures = {}
        for column in (*QUALITY, *cost(target)):
            values = [value for value in map(column.figure, by_seed.values()) if value is not None]
            if values:
                figures[column.name] = {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
        runs = [{"seed": seed, **run.as_dict()} for seed, run in by_seed.items()]
        found.append({"name": name, "seeds": list(by_seed), **figures, "runs": runs})
    return found


def _device_names(outcomes: Outcomes) -> list[str]:
    runs = [run for by_seed in outcomes.values() for run in by_seed.values()]
    return list(dict.fromkeys(device.name for run in runs for device in run.devices))


def _of_devices(name: str, by_seed: Mapping[int, Outcome], names: Sequence[str]) -> list[str]:
    cells = [name]
    for device in names:
        found: list[DeviceOutcome] = [each for run in by_seed.values() for each in run.devices if each.name == device]
        accuracy = f"{statistics.mean(each.central_accuracy for each in found):.3f}" if found else "-"
        cells.append(accuracy + ("*" if any(each.attacker for each in found) else ""))
    return cells


def _markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in (headings, *lines)]
    ruler = ["---", *["---:"] * (len(headings) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (escaped[0], ruler, *escaped[1:]))
