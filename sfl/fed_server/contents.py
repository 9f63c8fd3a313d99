"""What a version holds: the submissions that it was made of, in a file of its folder.

They are written with the version, in the same move. So whatever happens to the server, a submission is in the pool or in a
version, and one that is in a version is known for ever.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sfl.errors import StateError

FILE = "submissions.json"


@dataclass(frozen=True)
class Entry:
    """A submission in a version, with the weight of its device's update there or the reason why that has none."""

    device: str
    submission: str
    version: int  # it stems from
    examples: int  # trained on
    steps: int
    weight: float = 0.0
    refused: str = ""


@dataclass(frozen=True)
class Contents:
    """Of one version. `federation` is the id that all versions of a federation share, `edge` who proposed version 0."""

    federation: str
    submissions: tuple[Entry, ...] = ()
    edge: str = ""

    def files(self) -> dict[str, bytes]:
        """The file, by name."""
        return {FILE: (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode()}


def load(adapters: Path, version: int) -> Contents | None:
    """What `version` in the folder `adapters` holds; None for one that an earlier release of sfl wrote, or that is not there.

    Raises `StateError` for a damaged file, `OSError` for one that cannot be read now.
    """
    path = adapters / f"v{version}" / FILE
    try:
        document = json.loads(path.read_bytes())
        entries = tuple(Entry(**fields) for fields in document.pop("submissions"))
        return Contents(submissions=entries, **document)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StateError(
            f"{path} is damaged ({error!r}): restore it from a backup, or delete it, after which the submissions in that version"
            " may be counted again"
        ) from error
