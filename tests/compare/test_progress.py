"""What is said on the way."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from sfl.compare.progress import LINE_S, EachOnce, Progress


def test_the_time_that_is_left_follows_the_steps_that_are_made() -> None:
    now, text = [0.0], io.StringIO()
    progress = Progress(Console(file=text, width=200), lambda: now[0])
    progress.begin([100, 300], 2)
    progress.run_begins("fedavg, seed 0")
    now[0] = LINE_S + 1
    progress.step(50)
    progress.run_ends()
    progress.run_begins("gsfs, seed 0")
    now[0] = 200.0
    assert progress.line() == "run 2 of 2: gsfs, seed 0, step 0 of 300, about 10 min left"
    progress.step(300)
    assert progress.line() == "run 2 of 2: gsfs, seed 0, step 300 of 300"
    lines = text.getvalue().splitlines()
    assert lines[0] == "2 runs to make, 2 are finished"
    assert lines[1] == "run 1 of 2: fedavg, seed 0, step 0 of 100"
    assert lines[2] == "run 1 of 2: fedavg, seed 0, step 50 of 100, about 3 min 37 s left"


def test_a_message_is_logged_once() -> None:
    once = EachOnce()
    records = [logging.makeLogRecord({"msg": "%d were cut", "args": (count,)}) for count in (1, 1, 2)]
    assert [once.filter(record) for record in records] == [True, False, True]
