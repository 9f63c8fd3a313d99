"""What is said on the way."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from sfl.compare.progress import LINE_S, EachOnce, Progress


def made(steps: list[int]) -> tuple[Progress, list[float], io.StringIO]:
    now, text = [0.0], io.StringIO()
    progress = Progress(Console(file=text, width=200), lambda: now[0])
    progress.begin(steps, 2)
    return progress, now, text


def test_the_time_that_is_left_follows_the_steps_that_are_made_and_not_what_came_before_them() -> None:
    progress, now, text = made([101, 300])
    now[0] = 500.0  # the model is loaded
    progress.run_begins("fedavg, seed 0")
    assert progress.line() == "run 1 of 2: fedavg, seed 0, loading"
    for now[0], done in ((509.0, 0), (510.0, 1), (510.0 + LINE_S, 51), (535.0 + LINE_S, 101)):  # a first step takes longer, too
        progress.step(done)
    assert progress.line() == "run 1 of 2: fedavg, seed 0, evaluating, about 2 min 45 s of training left"
    now[0] = 585.0
    progress.run_ends()
    progress.run_begins("gsfs, seed 0")
    assert progress.line() == "run 2 of 2: gsfs, seed 0, loading, about 3 min 5 s left"
    progress.step(1)
    progress.step(300)
    assert progress.line().startswith("run 2 of 2: gsfs, seed 0, evaluating, about 20 s left")
    now[0] = 600.0
    progress.run_ends()
    assert text.getvalue().splitlines() == [
        "2 runs to make, 2 are finished",
        "run 1 of 2: fedavg, seed 0, 101 steps",
        "run 1 of 2: fedavg, seed 0, step 51 of 101, about 3 min 30 s of training left",
        "run 1 of 2: fedavg, seed 0 took 1 min 25 s, about 3 min 5 s left",
        "run 2 of 2: gsfs, seed 0, 300 steps",
        "run 2 of 2: gsfs, seed 0 took 15 s",
    ]


def test_a_run_that_fails_is_not_said_to_be_made() -> None:
    progress, now, text = made([10, 10])
    progress.run_begins("too fast, seed 0")
    progress.step(1)
    progress.run_ends(False)
    progress.run_begins("good, seed 0")
    for now[0], done in ((1.0, 1), (10.0, 10), (12.0, 10)):
        progress.step(done)
    progress.run_ends()
    assert text.getvalue().splitlines()[1:] == [
        "run 1 of 2: too fast, seed 0, 10 steps",
        "run 2 of 2: good, seed 0, 10 steps",
        "run 2 of 2: good, seed 0 took 12 s",
    ]


def test_a_message_is_logged_once() -> None:
    once = EachOnce()
    records = [logging.makeLogRecord({"msg": "%d were cut", "args": (count,)}) for count in (1, 1, 2)]
    assert [once.filter(record) for record in records] == [True, False, True]
