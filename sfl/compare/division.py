"""Who has which examples: a folder of files, one device each, or one file divided anew for each seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

from sfl.compare.settings import CompareSettings
from sfl.data.example import Example
from sfl.data.load import load_splits
from sfl.data.settings import DataSettings
from sfl.data.split import Splits
from sfl.errors import DataError, DataFileError, SettingsError
from sfl.telemetry import log

_ENDINGS = (".tsv", ".csv", ".labeled", ".log", ".jsonl", ".ndjson", ".txt")


@dataclass(frozen=True)
class Division:
    """The devices' data, and what they hold, by name in the order of the devices."""

    data: dict[str, DataSettings]
    splits: dict[str, Splits]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """All labels that any device has, sorted."""
        return tuple(sorted({label for splits in self.splits.values() for label in splits.labels}))

    @cached_property
    def pooled(self) -> Splits:
        """All training examples at one place, in the order of the devices; nothing for validation or test."""
        first = next(iter(self.splits.values()))
        return Splits([example for splits in self.splits.values() for example in splits.train], [], [], first.columns)

    @cached_property
    def tests(self) -> dict[str, list[Example]]:
        """Each device's test examples."""
        return {name: splits.test for name, splits in self.splits.items()}

    @property
    def majority(self) -> str:
        """The most frequent label of the training examples, the first by name of several."""
        counts = Counter(example.label or "" for example in self.pooled.train)
        return min(counts, key=lambda label: (-counts[label], label))


class Source:
    """The files. Raises `DataError` or `SettingsError` for a folder without files and for settings that do not go together."""

    def __init__(self, settings: CompareSettings) -> None:
        path, self._settings = settings.data, settings
        self._files = _files(path)
        if path.is_dir() and (settings.devices, settings.alpha) != (None, None):
            raise SettingsError(
                f"{path} is a folder, one device a file: `devices` and `alpha` are for one file that several devices share"
            )
        if not path.is_dir() and settings.devices is None:
            raise SettingsError(f"{path} is one file: say with `devices` how many devices share it, or name a folder of files")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the names and contents of the files."""
        digest = hashlib.sha256()
        for path in self._files:
            digest.update(f"{path.name}\n{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
        return digest.hexdigest()

    def division(self, seed: int) -> Division:
        """Each device's examples under this seed; a folder is divided as it is. Raises `DataError` as `load_splits` does, and
        for fewer than two labels."""
        return self._division(0 if self._settings.devices is None else seed)

    @lru_cache(maxsize=1)  # noqa: B019  # one comparison has one source
    def _division(self, seed: int) -> Division:
        data = self._data(seed)
        division = Division(data, {name: load_splits(each, "classification") for name, each in data.items()})
        if len(division.labels) < 2:
            raise DataError(
                f"{self._settings.data} holds only one label, '{''.join(division.labels)}': a comparison needs two or more"
            )
        return division

    def _data(self, seed: int) -> dict[str, DataSettings]:
        common = self._settings.reading.model_dump()
        count = self._settings.devices
        if count is None:
            return {name: DataSettings(path=path, **common) for name, path in zip(_names(self._files), self._files)}
        scheme = "iid" if self._settings.alpha is None else "label-skew"
        shared = {"path": self._files[0], "part_count": count, "partition": scheme, "partition_seed": seed, **common}
        if self._settings.alpha is not None:
            shared["partition_alpha"] = self._settings.alpha
        return {f"device-{index + 1}": DataSettings(part_index=index, **shared) for index in range(count)}


def _files(path: Path) -> list[Path]:
    if not path.exists():
        raise DataFileError(f"there is no data file or folder {path}")
    if not path.is_dir():
        return [path]
    visible = sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))
    files = [each for each in visible if each.suffix.lower() in _ENDINGS]
    if not files:
        raise DataFileError(f"the folder {path} holds no data: it needs a file for each device, ending in {', '.join(_ENDINGS)}")
    if len(files) < len(visible):
        log.info("%s: left out %s", path, ", ".join(each.name for each in visible if each not in files))
    return files


def _names(files: list[Path]) -> list[str]:
    """The files' names up to the first dot, or whole where these are not different."""
    short = [path.name.split(".")[0] for path in files]
    return short if len(set(short)) == len(short) else [path.name for path in files]
