"""A profile as data, and as JSON with these very keys. All sizes are in MB of 10**6 bytes, all times in seconds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from sfl.errors import SettingsError
from sfl.profiling.board.facts import Board
from sfl.profiling.recorder import Moment
from sfl.profiling.timeline import Span

FORMAT = 1


@dataclass(frozen=True)
class Part:
    """`mb` of the peak that `name` accounts for; None: not measured, and then it is in the last part, the rest."""

    name: str
    mb: float | None


@dataclass(frozen=True)
class Peak:
    """The highest RSS, when it was reached (to the 10 ms of the samples, since the process began), in which phase of which
    step (from 1; 0: before the first). `exact`: the kernel kept it, so that nothing between two samples was missed."""

    rss_mb: float
    at_s: float
    phase: str
    step: int
    exact: bool


@dataclass(frozen=True)
class Phase:
    """All stays in a phase: how often, how long, the highest RSS in them and the mean over time."""

    name: str
    count: int
    seconds: float
    peak_mb: float
    mean_mb: float


@dataclass(frozen=True)
class Energy:
    """`joules` of the whole machine over `steps` steps, by the sensor `source`."""

    source: str
    joules: float
    steps: int
    joules_per_step: float


@dataclass(frozen=True)
class Profile:
    """What `profile.json` holds.

    `kind` is `device` (a device half watched from inside) or `process` (any process watched from outside), `settings` what
    was profiled. `parts` add up to `peak.rss_mb`; a process's are those of the last look, and add up to its RSS then.
    `phases` and `spans` are empty for a process. `moments` are the figures of the kernel and the C heap by occasion. `cuda`
    holds torch's MB `allocated`, `reserved` and `max_allocated` on the GPU and those of each part, None without a GPU.
    `energy` is None where it is not measured, `limit_mb` where no limit was given or found. `rss`, `pss` and `uss` are
    points (seconds, MB).
    """

    format: int
    kind: Literal["device", "process"]
    settings: dict[str, Any]
    peak: Peak
    parts: tuple[Part, ...]
    phases: tuple[Phase, ...]
    moments: dict[str, Moment]
    cuda: dict[str, float] | None
    energy: Energy | None
    board: Board
    limit_mb: float | None
    spans: tuple[Span, ...]
    rss: tuple[tuple[float, float], ...]
    pss: tuple[tuple[float, float], ...]
    uss: tuple[tuple[float, float], ...]

    @property
    def seconds(self) -> float:
        """When the last point was taken."""
        return max((points[-1][0] for points in (self.rss, self.uss) if points), default=0.0)

    def to_json(self) -> str:
        return _adapter().dump_json(_adapter().validate_python(self), indent=1).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> Profile:
        """Raises `SettingsError` for text that is no profile of this format."""
        try:
            profile = _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise SettingsError(f"this is no profile{f' ({where}: ' if where else ' ('}{first['msg']})") from None
        if profile.format != FORMAT:
            raise SettingsError(f"this profile has format {profile.format}, and this version reads {FORMAT}: profile again")
        return profile


def read_profile(path: Path) -> Profile:
    """Raises `SettingsError` naming the file when it is not there or holds no profile."""
    try:
        return Profile.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"'{path}' cannot be read: {error}") from error
    except SettingsError as error:
        raise SettingsError(f"'{path}': {error}") from None


def write_profile(path: Path, profile: Profile) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(profile.to_json(), encoding="utf-8")
    partial.replace(path)


def _adapter() -> TypeAdapter[Profile]:
    global _made
    if _made is None:
        _made = TypeAdapter(Profile)
    return _made


_made: TypeAdapter[Profile] | None = None
