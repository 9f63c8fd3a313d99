"""Local child processes that live and die together."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sfl.errors import SflError

TICK_S = 0.25  # between two looks at the children
_PR_SET_PDEATHSIG = 1
_ERROR = re.compile(r"error( SFL-\d+)?:", re.IGNORECASE)  # as the command line ends
_LOG_TAIL = 65536  # bytes of a log searched for its last error


class ChildError(SflError):
    """A child process failed, or ended before its time."""

    number = 4


@dataclass(frozen=True)
class Program:
    """One child: what to run, and the file that takes its stdout and stderr.

    A program with `ends` is finished when it exits with 0; any other serves until it is told to stop.
    """

    name: str
    command: Sequence[str]
    log: Path
    ends: bool


class Supervisor:
    """Runs programs until those that end by themselves have ended well, then stops the others.

    Whatever happens (a failure, Ctrl-C, SIGTERM, an exception of the caller's), no child outlives `run`; on Linux the
    kernel kills them even when this process is killed.
    """

    def __init__(
        self, programs: Sequence[Program], env: Mapping[str, str] | None = None, grace_s: float = 5.0, finish_s: float = 30.0
    ) -> None:
        """`env` is the programs' environment, None for this process's. `grace_s`: seconds from SIGTERM to SIGKILL when a run is
        broken off; `finish_s`: seconds that a server may take to end in order when all is done."""
        self._programs = list(programs)
        self._env = None if env is None else dict(env)
        self._grace_s, self._finish_s = grace_s, finish_s
        self._children: list[tuple[Program, subprocess.Popen[bytes]]] = []
        self._signals = 0

    def run(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Start all, call `on_tick` a few times a second, return when every program has exited with 0.

        Raises `ChildError` for the first child that fails, is killed or, serving, ends too early, and `KeyboardInterrupt`
        after Ctrl-C or SIGTERM; the children are stopped first: SIGTERM, then SIGKILL after `grace_s` seconds (at once on a
        second Ctrl-C).
        """
        with self._signals_counted():
            try:
                for program in self._programs:
                    self._start(program)
                self._wait(lambda: any(program.ends for program, child in self._children if child.returncode is None), on_tick)
                # Nobody is left to serve. The rest ends in reverse order of the start: edges before the federation server.
                for program, child in reversed(self._children):
                    if child.returncode is None:
                        child.terminate()
                        self._wait_for_end(program, child)
                on_tick()
            finally:
                self._stop()

    def pids(self) -> dict[str, int]:
        """Process ids of the children started so far, by name."""
        return {program.name: child.pid for program, child in self._children}

    def _start(self, program: Program) -> None:
        program.log.parent.mkdir(parents=True, exist_ok=True)
        with program.log.open("wb") as log:
            try:
                # An own session: a terminal's Ctrl-C reaches this process alone, which then stops the children in order.
                child = subprocess.Popen(
                    program.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._env,
                    start_new_session=True,
                    preexec_fn=_die_with_parent(),
                )
            except OSError as error:
                raise ChildError(f"{program.name} could not be started ({' '.join(program.command)}): {error}") from error
        self._children.append((program, child))

    def _wait(self, unfinished: Callable[[], bool], on_tick: Callable[[], None]) -> None:
        while True:
            self._check()
            on_tick()
            if not unfinished():
                return
            time.sleep(TICK_S)

    def _check(self) -> None:
        """Raise for a signal that came, or for the first child (as they were started) that ended as it should not."""
        if self._signals:
            raise KeyboardInterrupt
        for program, child in self._children:
            code = child.poll()
            if code is not None and (code != 0 or not program.ends):
                raise ChildError(_obituary(program, code))

    def _wait_for_end(self, program: Program, child: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._finish_s
        while child.poll() is None:
            if self._signals:
                raise KeyboardInterrupt
            if time.monotonic() > deadline:
                raise ChildError(f"{program.name} did not end within {self._finish_s:g} s of SIGTERM; see {program.log}")
            time.sleep(TICK_S / 5)
        if child.returncode != 0:
            raise ChildError(_obituary(program, child.returncode))

    def _stop(self) -> None:
        signals = self._signals
        running = [child for _, child in self._children if child.poll() is None]
        for child in running:
            child.terminate()
        deadline = time.monotonic() + self._grace_s
        while any(child.poll() is None for child in running) and time.monotonic() < deadline and self._signals == signals:
            time.sleep(TICK_S / 5)
        for child in running:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # with whatever the child may have started
                child.wait()

    @contextlib.contextmanager
    def _signals_counted(self) -> Iterator[None]:
        """Count SIGINT, SIGTERM and SIGHUP instead of being torn out of a half-made step by them."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread only
            return

        def count(number: int, frame: object) -> None:
            self._signals += 1

        before = {number: signal.signal(number, count) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def last_error(log: Path) -> str:
    """The last line of `log` that reports an error, or its last line, or "" for an empty or missing log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
    except FileNotFoundError:
        return ""
    errors = [line for line in lines if _ERROR.match(line) or " ERROR " in line or " CRITICAL " in line]
    return (errors or lines or [""])[-1]


def _obituary(program: Program, code: int) -> str:
    if code < 0:
        try:
            end = f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            end = f"was killed by signal {-code}"
    elif code == 0:
        end = "ended while it was still needed (exit code 0)"
    else:
        end = f"failed with exit code {code}"
    error = last_error(program.log)
    return f"{program.name} {end}{f': {error}' if error else ''}\n  its log: {program.log}"


def _die_with_parent() -> Callable[[], None] | None:
    """What a child does first, so that the kernel kills it when this process is gone, however it went. Linux only."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    parent = os.getpid()

    def arrange() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os.kill(os.getpid(), signal.SIGKILL)

    return arrange
