"""The cut of a device that has only begun: chosen in a process of its own, which takes the memory for planning with it.

Counting on the meta device brings in some 90 MB of torch's symbolic shapes, more than a small device can spare for good.
Nothing here needs torch until the other process runs.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import sfl.errors
from sfl.adapters.layout import LoraSpec
from sfl.errors import SettingsError, SflError
from sfl.planning.request import PlanRequest
from sfl.telemetry import log

_TIMEOUT_S = 900.0


class ChosenCut(NamedTuple):
    """A cut, and the MB at most that a device with it is predicted to take, in memory and, for its half of the model and for one
    checkpoint, on disk."""

    cut: int
    device_mb: float
    half_mb: float = 0.0
    checkpoint_mb: float = 0.0


def choose_cut_apart(
    model: str | Mapping[str, Any], request: PlanRequest, memory_mb: float, cut: int | None = None
) -> ChosenCut | None:
    """The cut that `sfl.planning.choice.choose_cut` chooses, or the one that was asked for if it fits.

    `model` is a folder or hub id, or a configuration as a tree. To be called before torch is imported here, as both processes
    together must fit. Raises as `choose_cut` and `require_fits` do. When the planner breaks off, that is a `SettingsError` where
    it was to choose, and otherwise None and a warning.
    """
    question = {
        "model": model if isinstance(model, str) else dict(model),
        "request": asdict(request),
        "memory_mb": memory_mb,
        "cut": cut,
    }
    command = [sys.executable, "-m", "sfl.planning.apart"]
    try:
        done = subprocess.run(
            command, input=json.dumps(question), capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        answer = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        _no_answer(f"it took more than {_TIMEOUT_S:g} s", cut, error)
        return None
    except ValueError as error:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        _no_answer(reason, cut, error)
        return None
    if "error" in answer:
        raise getattr(sfl.errors, answer["kind"])(answer["error"])
    for warning in answer["warnings"]:
        log.warning("%s", warning)
    return ChosenCut(int(answer["cut"]), *(float(answer[name]) for name in ChosenCut._fields[1:]))


def _no_answer(reason: str, cut: int | None, error: Exception) -> None:
    if cut is None:
        raise SettingsError(f"planning the cut broke off ({reason}): set the cut, or see `sfl plan`") from error
    log.warning("whether cut %d fits is not known, as planning it broke off: %s", cut, reason)


def _answer(question: dict[str, Any]) -> dict[str, Any]:
    from sfl.model.lean_imports import lean_imports

    lean_imports()
    from transformers import AutoConfig

    from sfl.model.load import load_config
    from sfl.planning.choice import choose_cut, require_fits

    lora = question["request"].pop("lora")
    request = PlanRequest(**question["request"], lora=LoraSpec(**{**lora, "target_modules": tuple(lora["target_modules"])}))
    model, memory_mb, cut = question["model"], question["memory_mb"], question["cut"]
    warnings: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        warnings.append(record.getMessage())
        return False  # the parent logs it

    log.addFilter(keep)
    config = load_config(model) if isinstance(model, str) else AutoConfig.for_model(**model)
    chosen = choose_cut(config, request, memory_mb) if cut is None else require_fits(config, request, cut, memory_mb)
    return {**{name: getattr(chosen, name) for name in ChosenCut._fields}, "warnings": warnings}


def main() -> None:
    """Answer one question, both as JSON: from standard input to standard output."""
    try:
        answer = _answer(json.loads(sys.stdin.read()))
    except SflError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
