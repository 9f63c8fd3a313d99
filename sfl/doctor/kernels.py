"""Each number format, tried by running a small layer in it, in a process of its own: an instruction that the processor lacks ends
that process and not the doctor."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from sfl.doctor.finding import Finding, failed, passed, warned
from sfl.settings import Precision, RunOn, compute_format

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "nf4")
_TIMEOUT_S = 180.0


def check_precisions(needed: Precision | None = None, run_on: RunOn = "cpu") -> Iterator[Finding]:
    """A line for each format: failed where it is the one `needed`, and warned of otherwise."""
    for precision, answer in try_precisions(run_on).items():
        name = f"precision {precision}"
        if answer["why"] is None:
            yield passed(name, f"a layer runs, forward and backward, in {1000 * answer['seconds']:.1f} ms")
        elif precision == needed:
            yield failed(name, answer["why"], "choose another `precision`, or mend what is named")
        else:
            yield warned(name, answer["why"], "no matter, unless a device or an edge server is to use it")


def try_precisions(run_on: RunOn, precisions: Sequence[Precision] = PRECISIONS) -> dict[Precision, dict[str, Any]]:
    """For each format the `seconds` that a layer took, and `why` it does not run, None where it does."""
    found: dict[Precision, dict[str, Any]] = {}
    while left := [precision for precision in precisions if precision not in found]:
        answers, ended = _run(run_on, left)
        found |= answers
        if len(answers) < len(left):  # it ended while it tried the next one
            found[left[len(answers)]] = {"seconds": 0.0, "why": ended}
    return found


def _run(run_on: RunOn, precisions: Sequence[Precision]) -> tuple[dict[Precision, dict[str, Any]], str]:
    command = [sys.executable, "-m", "sfl.doctor.kernels", run_on, *precisions]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return _answers(text, precisions), f"it did not come to an end in {_TIMEOUT_S:g} s"
    if done.returncode < 0:
        return _answers(done.stdout, precisions), f"the process that tried it was ended by {_signal(-done.returncode)}"
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return _answers(done.stdout, precisions), f"the process that tried it broke off: {last}"


def _answers(text: str, precisions: Sequence[Precision]) -> dict[Precision, dict[str, Any]]:
    return dict(zip(precisions, (json.loads(line) for line in text.splitlines())))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def main(run_on: RunOn, *precisions: Precision) -> None:
    """Try formats one after the other; a line of JSON for each, as soon as it is known."""
    from sfl.errors import ModelError
    from sfl.model.lean_imports import lean_imports

    lean_imports()
    from sfl.model.precision import require_runnable

    for precision in precisions:
        started, why = time.perf_counter(), None
        try:
            require_runnable(precision, compute_format(precision), run_on)
        except ModelError as error:
            why = str(error)
        sys.stdout.write(json.dumps({"seconds": time.perf_counter() - started, "why": why}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])  # type: ignore[arg-type]
