"""A whole comparison: every run that is not finished yet, one after the other, then the tables and pictures."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from sfl.compare.division import Source
from sfl.compare.job import Job, prepare
from sfl.compare.progress import Progress
from sfl.compare.run import Loaded, run
from sfl.compare.settings import CompareSettings
from sfl.compare.store import Planned, Store, planned
from sfl.compare.variants import Variant, variants
from sfl.errors import DataError, SflError
from sfl.model.default import default_model
from sfl.model.fingerprint import model_fingerprint
from sfl.telemetry import log


def compare(settings: CompareSettings, progress: Progress) -> tuple[Store, list[str]]:
    """Make the runs that are missing in `settings.out`, seed by seed, so that a part of the seeds is a comparison, too.

    Returns the folder and the titles of the runs that failed, which are logged, and tried again by the next call. Raises
    `SettingsError`, `DataError` or `ModelError` before the first one for what cannot be.
    """
    if settings.threads:
        torch.set_num_threads(settings.threads)
    chosen, source = variants(settings), Source(settings)
    if not settings.reading.test:
        raise DataError("a comparison needs test examples: set reading.test above 0")
    model = settings.model or str(default_model("classification"))
    fingerprint = model_fingerprint(model)
    store = Store(settings.out)

    def job(variant: Variant, seed: int) -> Job:
        return prepare(settings, model, variant, seed, source.division(seed))

    seeds = range(settings.first_seed, settings.first_seed + settings.seeds)
    plan = [
        (planned(made, settings, source.fingerprint, fingerprint), variant, made.steps)
        for seed in seeds
        for variant in chosen
        for made in [job(variant, seed)]
    ]
    store.begin(settings, source.fingerprint, fingerprint, [run for run, _, _ in plan])
    todo = [(run, variant, steps) for run, variant, steps in plan if store.finished(run) is None]
    progress.begin([steps for _, _, steps in todo], len(plan) - len(todo))
    loaded: Loaded | None = None
    failed: list[str] = []
    for entry, variant, _ in todo:
        made = job(variant, entry.seed)
        if loaded is None or loaded.labels != made.division.labels:
            loaded = Loaded(model, made.division.labels, settings)
        progress.run_begins(made.title)
        try:
            _make(made, entry, settings, loaded, store, progress.step)
        except SflError as error:
            log.error("%s failed: %s", made.title, error)
            failed.append(made.title)
        progress.run_ends(made.title not in failed)
    return store, failed


def _make(
    job: Job, entry: Planned, settings: CompareSettings, loaded: Loaded, store: Store, on_step: Callable[[int], None]
) -> None:
    kept = store.folder(entry)
    shutil.rmtree(kept, ignore_errors=True)  # of a run that was broken off, which would be resumed
    with nullcontext(str(kept)) if settings.keep else tempfile.TemporaryDirectory() as folder:
        outcome = run(job, settings, loaded, Path(folder), on_step)
    store.save(entry, outcome, {"settings": {"run": job.variant.settings.model_dump(mode="json"), "fed": job.variant.fed}})
