"""Rows of figures by hand: means, spreads, weights, and what is left out."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from sfl.compare.outcome import Outcome, Point, Scores
from sfl.compare.table import COST, QUALITY, as_json, as_markdown, as_text, cell, columns, cost, rows
from tests.compare.made import outcome

COLUMNS = {column.name: column for column in (*QUALITY, *COST)}


def figure(name: str, **changes: Any) -> float | None:
    return COLUMNS[name].figure(outcome(**changes))


def test_figures_of_a_run() -> None:
    assert figure("device_accuracy") == pytest.approx((10 * 0.5 + 30 * 0.9) / 40)
    assert figure("device_loss") == pytest.approx((10 * 1.0 + 30 * 0.5) / 40)
    assert figure("device_accuracy", attacked=True) == 0.5
    assert figure("fairness_sd") == pytest.approx(0.1)
    assert figure("worst_device") == 0.6
    assert (figure("fed_received_mb"), figure("latency_ms"), figure("requests_per_minute")) == (10.0, 10.0, 6000.0)
    assert figure("split_requests_per_minute") == 3000.0


def test_a_cell_has_mean_and_spread() -> None:
    runs = [outcome(accuracy) for accuracy in (0.9, 0.8, 0.94)]
    assert cell(COLUMNS["accuracy"], runs) == "0.880 (0.800-0.940)"
    assert cell(COLUMNS["accuracy"], runs[:1]) == "0.900"
    assert cell(COLUMNS["calibration_error"], runs) == "0.100"
    assert cell(COLUMNS["backdoor"], runs) == "-"
    assert cell(COLUMNS["submissions"], [outcome(submissions=3), outcome(submissions=6)]) == "4"


def test_a_target_has_its_price() -> None:
    def run(*accuracies: float) -> Outcome:
        points = [Point(n, 10 * n, n * 10**6, 0, 2.0 * n, 0.0, Scores(each, 0.1, 1.0)) for n, each in enumerate(accuracies)]
        return replace(outcome(), curve=tuple(points))

    seconds, megabytes = (column for column in cost(0.5) if column not in COST)
    assert (seconds.title, megabytes.title) == ("simulated s to 0.5", "MB up, to 0.5")
    swinging, never = run(0.1, 0.4, 0.5, 0.3, 0.6), run(0.1, 0.4)
    assert (seconds.figure(swinging), megabytes.figure(swinging)) == (4.0, 2.0)
    assert cell(seconds, [swinging, never]) == "4 [1 of 2]" and cell(seconds, [never]) == "-"
    outcomes = {"a": {0: swinging}, "b": {0: never}}
    assert "simulated s to 0.5" in as_markdown(outcomes, 0.5) and "to 0.5" not in as_markdown(outcomes)
    assert as_json(outcomes, 0.5)[0]["target_s"]["mean"] == 4.0


def test_columns_that_no_run_has_are_left_out() -> None:
    plain = {"fedavg": {0: outcome()}}
    attacked = {**plain, "worse": {0: outcome(backdoor=0.5, without_trigger=0.1, epsilon=3.0, refused=2, lost=1)}}
    shown = {column.name for column in columns(plain, (*QUALITY, *COST))}
    assert "backdoor" not in shown and "refused" not in shown and "accuracy" in shown
    more = {column.name for column in columns(attacked, (*QUALITY, *COST))}
    assert more - shown == {"backdoor", "without_trigger", "epsilon", "refused", "lost"}


def test_a_run_without_refused_updates_has_0_of_them_beside_those_with_some() -> None:
    nothing_sent = {"submissions": None, "fed_received": None, "fed_sent": None}
    outcomes = {
        "good": {0: outcome(), 1: outcome()},
        "worse": {0: outcome(refused=3), 1: outcome(refused=0, lost=1)},
        "centralised": {0: outcome(**nothing_sent)},
    }
    shown = [column for column in columns(outcomes, COST) if column.name in ("refused", "lost")]
    assert [row[2:] for row in rows(outcomes, shown)] == [["0.0", "0.0"], ["1.5", "0.5"], ["-", "-"]]
    assert as_json(outcomes)[1]["refused"] == {"mean": 1.5, "min": 0, "max": 3}
    assert columns({"good": outcomes["good"]}, shown) == [], "a column of noughts says nothing"
    assert columns({"safe": {0: outcome(backdoor=0.0)}}, [COLUMNS["backdoor"]]), "but a backdoor that never works does"


@pytest.mark.parametrize("width", [80, 120, 240])
def test_a_table_is_as_wide_as_the_screen_at_most_and_none_of_it_is_lost(width: int) -> None:
    outcomes = {name: {0: outcome(0.9), 1: outcome(0.8)} for name in ("fedavg, flexlora", "gsfs")}
    screen = Console(file=io.StringIO(), width=10**3)
    found = as_text(outcomes, 0.5, width)
    for table in found:
        screen.print(table)
    text = screen.file.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert [column.header for table in found for column in table.columns if column.header] == [
        "seeds",
        *(column.title for column in columns(outcomes, QUALITY)),
        "seeds",
        *(column.title for column in columns(outcomes, cost(0.5))),
    ]
    assert len(found) == 2 if width == 240 else {"how good, continued", "at what cost, continued"} <= {t.title for t in found}


def test_text_markdown_and_json_say_the_same() -> None:
    nothing = {"submissions": None, "fed_received": None, "fed_sent": None, "edge_received": None, "split_latency_s": None}
    outcomes = {"a | b": {0: outcome(0.9, attacked=True), 1: outcome(0.8)}, "centralised": {0: outcome(0.95, **nothing)}}
    shown = columns(outcomes, QUALITY)
    assert rows(outcomes, shown)[0][:3] == ["a | b", "2", "0.850 (0.800-0.900)"]
    assert [table.row_count for table in as_text(outcomes)] == [2, 2]
    markdown = as_markdown(outcomes)
    assert "| a \\| b | 2 | 0.850 (0.800-0.900) |" in markdown and "| centralised | 1 | 0.950 |" in markdown
    assert "| last version on | a | b |" in markdown and "| a \\| b | 0.600 | 0.800* |" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines[:4]} == {len(shown) + 3}
    first = json.loads(json.dumps(as_json(outcomes)))[0]
    assert first["accuracy"] == {"mean": pytest.approx(0.85), "min": 0.8, "max": 0.9}
    assert [run["seed"] for run in first["runs"]] == [0, 1] and first["runs"][0]["devices"][1]["attacker"] is True
    assert "fed_received_mb" not in as_json(outcomes)[1]
