"""Which model each edge server provided last, so that a device notices when that changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from sfl.cache.lock import wait_for_lock

_WAIT_S = 10.0


class Provided(NamedTuple):
    """A model as an edge server called it, its fingerprint, and the source of the halves."""

    base_model: str
    fingerprint: str
    source: str


class KnownEdges:
    """Address -> model, in the file `edges.json` of a cache folder that several devices may share."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.expanduser()
        self._file = self._folder / "edges.json"

    def all(self) -> dict[str, Provided]:
        """What is remembered; nothing where the file is missing or damaged."""
        try:
            tree = json.loads(self._file.read_text(encoding="utf-8"))
            return {
                str(address): Provided(str(model), str(fingerprint), str(source))
                for address, (model, fingerprint, source) in tree.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def remember(self, address: str, provided: Provided) -> None:
        self._change(address, provided)

    def forget(self, address: str) -> None:
        self._change(address, None)

    def _change(self, address: str, provided: Provided | None) -> None:
        with wait_for_lock(self._folder / "locks" / "edges.lock", _WAIT_S, "the list of known edge servers"):
            known = self.all()
            known.pop(address, None)
            if provided is not None:
                known[address] = provided
            fresh = self._file.with_suffix(".part")
            fresh.write_text(json.dumps(known, indent=1), encoding="utf-8")
            fresh.replace(self._file)
