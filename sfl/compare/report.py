"""The files of a comparison that people look at: compare.json, compare.md and the pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from sfl.compare.plots import draw
from sfl.compare.store import Store
from sfl.compare.table import as_json, as_markdown
from sfl.errors import SflError
from sfl.telemetry import log


def write_report(store: Store) -> list[Path]:
    """Write what is finished so far below `store.out`; the files. Raises `SflError` while nothing is.

    Without matplotlib there are no pictures, and a line in the log says so.
    """
    outcomes = store.outcomes()
    if not outcomes:
        raise SflError(f"{store.out} holds no finished run yet")
    figures, words = store.out / "compare.json", store.out / "compare.md"
    document = {"about": store.about, "variants": as_json(outcomes, store.target)}
    figures.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    title = headline(store)
    words.write_text(f"{title}\n\n{as_markdown(outcomes, store.target)}", encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no pictures: matplotlib is not installed (pip install '.[demo]')")
        return [figures, words]
    return [figures, words, *draw(store.out, outcomes, title)]


def headline(store: Store) -> str:
    """What was compared on what, in one line."""
    run = next(run for by_seed in store.outcomes().values() for run in by_seed.values())
    about = store.about
    optimizer = about["optimizer"]
    warmup = f" after {optimizer['warmup_steps']} steps of warm-up" if optimizer.get("warmup_steps") else ""
    return (
        f"{len(run.devices)} devices, {run.train} training and {run.test} test examples, {len(run.labels)} labels;"
        f" {about['steps']} steps of {about['batch_size']} each, {optimizer['name']} {optimizer['learning_rate']:g}"
        f" {optimizer['schedule']}{warmup}, {about['precision']} base"
    )
