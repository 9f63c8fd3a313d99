"""One run: a job trained in this process with the daemons' own engines, and its figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from sfl.adapters.peft_format import TENSORS
from sfl.compare.central import Adapted, Central, Logits, Texts, by_device, scores, share_taken_for
from sfl.compare.division import Division
from sfl.compare.figures import with_federation, without_federation
from sfl.compare.job import Job
from sfl.compare.outcome import Outcome, Point, Scores
from sfl.compare.settings import CompareSettings
from sfl.compare.variants import CENTRALISED
from sfl.errors import DataError, SettingsError
from sfl.settings import FedSettings
from sfl.simulation import LoadedHalves, simulate


class Loaded:
    """What is loaded once for the whole comparison: the uncut base, the halves that were needed, the tests as tokens."""

    def __init__(self, model: str, labels: tuple[str, ...], settings: CompareSettings) -> None:
        self.labels = labels
        self.central = Central(model, labels, settings.max_length, settings.run_on)
        self.halves = LoadedHalves()
        self._texts: tuple[Division, Texts] | None = None
        self._first: tuple[bytes, Scores] | None = None  # of the last version 0: runs of one seed begin with the same one

    def texts(self, division: Division) -> Texts:
        """The pooled test examples, in the order of the devices."""
        if self._texts is None or self._texts[0] is not division:
            pooled = [example for examples in division.tests.values() for example in examples]
            self._texts = division, self.central.texts(pooled)
            self._first = None
        return self._texts[1]

    def scores(self, adapters: Path, version: int, division: Division) -> Scores:
        """Those of a version on the pooled test examples."""
        texts, folder = self.texts(division), adapters / f"v{version}"
        tensors = (folder / TENSORS).read_bytes() if version == 0 else b""
        if version == 0 and self._first is not None and self._first[0] == tensors:
            return self._first[1]
        with self.central.adapted(folder) as adapted:
            found = scores(adapted.logits(texts), texts.labels)
        if version == 0:
            self._first = tensors, found
        return found


def run(job: Job, settings: CompareSettings, loaded: Loaded, out: Path, on_step: Callable[[int], None] | None = None) -> Outcome:
    """Train, then evaluate. Versions and metrics are written below `out`. Raises the `SflError` that ends the run early."""
    texts, triggered = loaded.texts(job.division), _triggered(job, loaded.central)
    started = monotonic()
    fed = job.fed.model_copy(update={"keep_versions": 0})  # which of them are evaluated is known when all are there
    simulated = simulate(fed, job.devices, out, conditions=job.conditions, halves=loaded.halves, on_step=on_step)
    wall_s = monotonic() - started
    newest, adapters = simulated.published[-1], out / "adapters"
    chosen = [simulated.published[index] for index in spaced(len(simulated.published), settings.curve_points)]
    curve = [Point(**vars(came), scores=loaded.scores(adapters, came.version, job.division)) for came in chosen if came != newest]
    with loaded.central.adapted(adapters / f"v{newest.version}") as adapted:
        logits = adapted.logits(texts)
        last_scores = scores(logits, texts.labels)
        if chosen:
            curve.append(Point(**vars(newest), scores=last_scores))
        outcome = Outcome(
            central=last_scores,
            devices=(),
            curve=tuple(curve),
            versions=newest.version,
            steps=job.steps,
            latency_s=adapted.seconds_each(texts, settings.latency_texts),
            wall_s=wall_s,
            simulated_s=newest.simulated_s,
            strategy=CENTRALISED if job.variant.centralised else _strategy(job.fed),
            labels=job.division.labels,
            train=len(job.division.pooled.train),
            test=len(texts),
        )
        if triggered is not None:
            outcome = _with_backdoor(outcome, job, adapted, logits[texts.labels != job.target], triggered)
    accuracies = by_device(texts.labels, logits, job.division.tests)
    if job.variant.centralised:
        return without_federation(outcome, job, accuracies)
    return with_federation(outcome, job, simulated, accuracies, texts, settings.latency_texts, out)


def _strategy(fed: FedSettings) -> str:
    return fed.strategy.name if fed.merge == "average" else f"{fed.strategy.name}, {fed.merge}"


def spaced(count: int, points: int) -> list[int]:
    """At most `points` of the numbers 0 to `count` - 1 in even steps: the first and the last, unless it is the last alone."""
    points = min(points, count)
    if points < 2:
        return [count - 1] * points
    return [round(index * (count - 1) / (points - 1)) for index in range(points)]


def _triggered(job: Job, central: Central) -> Texts | None:
    """The test examples with the backdoor's trigger. Raises `SettingsError` where most of them would lose it."""
    if job.variant.settings.attack.kind != "backdoor" or job.variant.centralised:
        return None
    examples = job.attackers.triggered([example for tests in job.division.tests.values() for example in tests])
    if not examples:
        raise DataError(f"no test example has another label than '{job.attackers.target}', the backdoor's target")
    lost = central.too_long(examples)
    if 2 * lost > len(examples):
        raise SettingsError(f"{lost} of {len(examples)} texts lose the backdoor's trigger at their end: raise max_length")
    return central.texts(examples)


def _with_backdoor(outcome: Outcome, job: Job, adapted: Adapted, without: Logits, triggered: Texts) -> Outcome:
    """`outcome` with what the trigger does; `without` are the logits of the same examples without it."""
    return dataclasses.replace(
        outcome,
        backdoor=share_taken_for(adapted.logits(triggered), job.target),
        without_trigger=share_taken_for(without, job.target),
    )
