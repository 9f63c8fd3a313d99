"""The folder of a comparison: what it compares, and the runs that are finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

import sfl
from sfl.compare.outcome import Outcome
from sfl.errors import SettingsError, SflError
from sfl.telemetry import log

if TYPE_CHECKING:  # what is finished can be shown without torch
    from sfl.compare.job import Job
    from sfl.compare.settings import CompareSettings

_FORMAT = 1  # of the files; another one is another comparison
_PLAN = "comparison.json"
# Settings that change nothing in a run's figures, or that are there in another form (a model's and the data's fingerprint).
_BESIDE = {
    *("data", "model", "path", "out", "adapters", "listen", "federation", "edge", "log_level", "threads", "profile"),
    *("wait_s", "give_up_s", "join_wait_s", "cache", "cache_limit_mb", "tight_memory", "provide", "keep_versions"),
}
_SHOWN = {"target"}  # in the tables and not in the runs: may change, too, and is noted
_FREE = {"strategies", "merges", "run", "seeds", "first_seed", "keep", *_BESIDE}  # may change between two calls for one folder


@dataclass(frozen=True)
class Planned:
    """A run that belongs to the table: the variant's name, the seed, the key of its file, and one for the variant."""

    name: str
    seed: int
    key: str
    variant: str


def planned(job: Job, settings: CompareSettings, data: str, model: str) -> Planned:
    """The job with its keys. That of its file is over all that determines its figures; data and model are fingerprints."""
    variant = {"run": _plain(job.variant.settings), "fed": job.variant.fed, "centralised": job.variant.centralised}
    whole = {
        **variant,
        "format": _FORMAT,
        "version": sfl.__version__,
        "data": data,
        "model": model,
        "seed": job.seed,
        "server": _plain(job.fed),
        "devices": [_plain(device) | {"part": _plain(device.data)} for device in job.devices],
        "curve_points": settings.curve_points,
        "latency_texts": settings.latency_texts,
    }
    return Planned(job.variant.name, job.seed, _key(whole), _key(variant))


class Store:
    """The folder `out` of one comparison. What all its runs share must stay the same; runs and seeds may be added.

    Raises `SettingsError` for a folder of another comparison or with other things in it.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.planned: list[Planned] = []
        self.about: dict[str, Any] = {}  # what all runs share
        if out.exists() and not out.is_dir():
            raise SettingsError(f"{out} is a file: choose another folder with --out")
        path = out / _PLAN
        if path.is_file():
            self._read(path)
        elif out.is_dir() and any(out.iterdir()):
            raise SettingsError(f"{out} is not empty and holds no comparison: choose another folder with --out")

    def _read(self, path: Path) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            self.about = dict(document["about"])
            self.planned = [Planned(**entry) for entry in document["runs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingsError(f"{path} is damaged ({error!r}): choose another folder with --out, or delete it") from None

    def begin(self, settings: CompareSettings, data: str, model: str, planned: Sequence[Planned]) -> None:
        """Note what is to be run, beside what has been; a variant of the same name takes the place of the earlier one.

        Raises `SettingsError`, naming the first difference, when the folder's comparison is another one.
        """
        about = {"format": _FORMAT, "data": data, "model": model, **_plain(settings, _FREE)}
        about = json.loads(json.dumps(about))
        for name in sorted((self.about.keys() | about.keys()) - _SHOWN) if self.about else ():
            if self.about.get(name) != about.get(name):
                raise SettingsError(
                    f"{self.out} holds another comparison: its {name} is {self.about.get(name)}, not {about.get(name)}; choose"
                    " another folder with --out"
                )
        now = {run.name: run.variant for run in planned}
        before = [run for run in self.planned if now.get(run.name, run.variant) == run.variant]
        runs = {(run.name, run.seed): run for run in (*before, *planned)}
        names = dict.fromkeys(run.name for run in (*planned, *before))
        self.about = about
        self.planned = [runs[place] for name in names for place in sorted(runs) if place[0] == name]
        self._write(_PLAN, {"about": about, "runs": [vars(run) for run in self.planned]})

    @property
    def target(self) -> float | None:
        """The accuracy that the tables say the cost of, if any."""
        return self.about.get("target")

    def finished(self, run: Planned) -> Outcome | None:
        """The outcome of a run, None while there is none; a damaged file is logged and counts as none."""
        path = self._path(run.key)
        if not path.is_file():
            return None
        try:
            return Outcome.from_dict(json.loads(path.read_text(encoding="utf-8"))["outcome"])
        except (OSError, ValueError, KeyError, TypeError, SflError) as error:
            log.warning("%s is damaged (%s): %s, seed %d, is run again", path, error, run.name, run.seed)
            return None

    def outcomes(self) -> dict[str, dict[int, Outcome]]:
        """All finished runs, by variant in the order of the table, then by seed."""
        found: dict[str, dict[int, Outcome]] = {}
        for run in self.planned:
            outcome = self.finished(run)
            if outcome is not None:
                found.setdefault(run.name, {})[run.seed] = outcome
        return found

    def save(self, run: Planned, outcome: Outcome, settings: Mapping[str, Any]) -> None:
        """Keep a finished run, whole or not at all; `settings` are for the reader."""
        (self.out / "runs").mkdir(exist_ok=True)
        self._write(f"runs/{run.key}.json", {"name": run.name, "seed": run.seed, "outcome": outcome.as_dict(), **settings})

    def folder(self, run: Planned) -> Path:
        """Where a run's adapters and metrics go when they are kept."""
        return self._path(run.key).with_suffix("")

    def _path(self, key: str) -> Path:
        return self.out / "runs" / f"{key}.json"

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        path = self.out / name
        unfinished = path.with_name(f".{path.name}")
        unfinished.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)


def _key(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:24]


def _plain(settings: BaseModel, without: set[str] = _BESIDE) -> dict[str, Any]:
    return {name: value for name, value in settings.model_dump(mode="json").items() if name not in without}
