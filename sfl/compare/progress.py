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
    """Counts local steps; what is left is estimated from how long those of this call have taken, evaluations included."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._steps: list[int] = []  # of each run that is to be made
        self._run = -1
        self._done = 0  # steps of the present run
        self._title = ""
        self._status: Status | None = None
        self._started = self._last_line = clock()

    def begin(self, steps: Sequence[int], finished: int) -> None:
        """`steps` local steps in each run that is to be made, beside `finished` ones."""
        self._steps = list(steps)
        before = f", {finished} are finished" if finished else ""
        self._say(f"{len(steps)} runs to make{before}")
        self._started = self._clock()

    def run_begins(self, title: str) -> None:
        self._run, self._done, self._title = self._run + 1, 0, title
        self._last_line = self._clock()
        if self._console.is_terminal:
            self._status = self._console.status(self.line())
            self._status.start()
        else:
            self._say(self.line())

    def step(self, done: int) -> None:
        """`done` local steps of this run are made."""
        self._done = done
        if self._status is not None:
            self._status.update(self.line())
        elif self._clock() - self._last_line >= LINE_S:
            self._last_line = self._clock()
            self._say(self.line())

    def run_ends(self) -> None:
        self._done = self._steps[self._run]
        if self._status is not None:
            self._status.stop()
            self._status = None
            self._say(self.line())

    def line(self) -> str:
        """The present run, its steps, and the time that is left."""
        whole = sum(self._steps)
        made = sum(self._steps[: self._run]) + self._done
        left = (self._clock() - self._started) / made * (whole - made) if made else None
        until = "" if left is None or made == whole else f", about {_duration(left)} left"
        return f"run {self._run + 1} of {len(self._steps)}: {self._title}, step {self._done} of {self._steps[self._run]}{until}"

    def _say(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes >= 10 else f"{minutes} min {rest} s" if minutes else f"{rest} s"
