"""What the user sees on standard error while a comparison runs: which run, how far, and how long yet."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.status import Status

LINE_S = 30.0  # between two lines of one run where standard error is no terminal


class EachOnce(logging.Filter):
    """Lets a message of the log through once: every run would say anew that a text was cut."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        fresh = message not in self._said
        self._said.add(message)
        return fresh


class Progress:
    """Counts local steps; what is left is estimated from how long those of this call have taken, from the first step of each run
    on, so without what is loaded before it, and from how long the evaluations after them have."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._steps: list[int] = []  # of each run that is to be made
        self._run = -1
        self._done = 0  # steps of the present run
        self._title = ""
        self._status: Status | None = None
        self._began = self._last_line = 0.0
        self._first: tuple[float, int] | None = None  # when the run's first step was made, or several at once, and how many
        self._latest = 0.0  # when its last one was
        self._timed: tuple[float, int] = 0.0, 0  # seconds and steps of the runs before, their first steps left out
        self._evaluations: list[float] = []  # seconds of the runs before, after their last steps

    def begin(self, steps: Sequence[int], finished: int) -> None:
        """`steps` local steps in each run that is to be made, beside `finished` ones."""
        self._steps = list(steps)
        before = f", {finished} are finished" if finished else ""
        self._say(f"{len(steps)} runs to make{before}")

    def run_begins(self, title: str) -> None:
        self._run, self._done, self._title, self._first = self._run + 1, 0, title, None
        self._began = self._last_line = self._clock()
        if self._console.is_terminal:
            self._status = self._console.status(self.line())
            self._status.start()
        else:
            self._say(f"{self._name}, {self._steps[self._run]} steps")

    def step(self, done: int) -> None:
        """`done` local steps of this run are made."""
        self._done, self._latest = done, self._clock()
        if self._first is None and done:
            self._first = self._latest, done
        if self._status is not None:
            self._status.update(self.line())
        elif self._latest - self._last_line >= LINE_S:
            self._last_line = self._latest
            self._say(self.line())

    def run_ends(self, made: bool = True) -> None:
        """The run is `made`, or has failed, which others say."""
        self.stop()
        now = self._clock()
        if made:
            self._timed = self._pace()
            self._evaluations.append(now - self._latest if self._first is not None else 0.0)
        self._first, self._done = None, self._steps[self._run]
        if made:
            left = self._left(len(self._steps) - self._run - 1)
            self._say(f"{self._name} took {_duration(now - self._began)}{left}")

    def stop(self) -> None:
        """Nothing more is shown in place; again is no harm."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def line(self) -> str:
        """The present run, its steps, and the time that is left."""
        steps = self._steps[self._run]
        what = "loading" if self._done == 0 else "evaluating" if self._done == steps else f"step {self._done} of {steps}"
        return f"{self._name}, {what}{self._left(len(self._steps) - self._run)}"

    @property
    def _name(self) -> str:
        return f"run {self._run + 1} of {len(self._steps)}: {self._title}"

    def _pace(self) -> tuple[float, int]:
        """Seconds and steps, of the runs before and of this one, without what each began with."""
        seconds, steps = self._timed
        if self._first is None:
            return seconds, steps
        return seconds + self._latest - self._first[0], steps + self._done - self._first[1]

    def _left(self, evaluations: int) -> str:
        """What is said of the time that so many evaluations and the steps before them will take; nothing where nobody knows."""
        seconds, steps = self._pace()
        todo = sum(self._steps[self._run :]) - self._done
        if not evaluations or not steps:
            return ""
        left = seconds / steps * todo
        if not self._evaluations:
            return f", about {_duration(left)} of training left" if todo else ""
        return f", about {_duration(left + evaluations * sum(self._evaluations) / len(self._evaluations))} left"

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
