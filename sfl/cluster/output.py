"""The folder that a run's files go to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sfl.errors import SettingsError
from sfl.telemetry import log

_MARKER = ".sfl-run"
_MADE = (_MARKER, "fed", "edge-*", "device-*", "adapters", "data", "summary.json", "loss.png")


def prepare_output(out: Path, inputs: Sequence[Path] = (), tell: Callable[[str], object] = log.warning) -> None:
    """Make `out` an empty folder for a run; what an earlier run left there is deleted, which `tell` hears, and nothing else.

    Raises `SettingsError` when `out` is a file or holds other things than an earlier run, or when one of `inputs` (data, model)
    would be deleted.
    """
    if out.exists() and not out.is_dir():
        raise SettingsError(f"{out} is a file: choose another folder with --out")
    if out.is_dir() and any(out.iterdir()):
        if not (out / _MARKER).is_file():
            raise SettingsError(f"{out} is not empty and holds no earlier run: choose another folder with --out, or empty it")
        old = [path for pattern in _MADE for path in out.glob(pattern)]
        for path in inputs:
            if any(path.resolve().is_relative_to(made.resolve()) for made in old):
                raise SettingsError(f"{path} would be deleted with the earlier run in {out}: choose another folder with --out")
        if old != [out / _MARKER]:
            tell(f"replacing the earlier run in {out}")
        for path in old:
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARKER).write_text(
        "This folder is written by sfl; the next run with the same --out replaces what it made.\n", encoding="utf-8"
    )
