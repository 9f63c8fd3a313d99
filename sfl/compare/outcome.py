"""What a run came to, as data that goes to a file and comes back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from sfl.errors import SflError


@dataclass(frozen=True)
class Scores:
    """Figures over test examples. `accuracy` and `f1_macro` are 0 to 1, `loss` in nats, `calibration_error` 0 to 1."""

    accuracy: float
    f1_macro: float
    loss: float
    calibration_error: float | None = None


@dataclass(frozen=True)
class Point:
    """A version on the way: what it had taken, and how good it was. `simulated_s` and `wall_s` are seconds since the start,
    the latter with all devices computing in turn."""

    version: int
    steps: int
    bytes_received: int
    bytes_sent: int
    simulated_s: float
    wall_s: float
    scores: Scores


@dataclass(frozen=True)
class DeviceOutcome:
    """A device after its last step. `own` are the figures of its own adapter on its own test examples, through the split and in
    the base's format of the training, None under centralised training and of a device that was lost; `central_accuracy` is that
    of the last version there. `epsilon` is what it has spent, None without noise."""

    name: str
    cut: int
    rank: int
    attacker: bool
    train: int
    test: int
    submissions: int
    own: Scores | None
    central_accuracy: float
    epsilon: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished run. Bytes are those of frames; `fed_received` (up) and `fed_sent` (down) are counted at the federation server,
    `edge_received` and `edge_sent` at the edge, of its devices. For centralised training, where nothing is sent, they are None.

    `latency_s` is the mean time of classifying one text with the uncut model, `split_latency_s` through device and edge.
    `backdoor` and `without_trigger` are the shares of texts of other labels that are taken for the target's, with the trigger and
    without; None unless there is a backdoor. `refused` counts the updates that the federation server did not use, `lost` the
    devices that failed before their end. `epsilon` is the greatest of any device. `strategy` has the merge beside it, unless
    that is the average.
    """

    central: Scores
    devices: tuple[DeviceOutcome, ...]
    curve: tuple[Point, ...]
    versions: int
    steps: int
    latency_s: float
    wall_s: float
    simulated_s: float
    strategy: str
    labels: tuple[str, ...]
    train: int
    test: int
    submissions: int | None = None
    fed_received: int | None = None
    fed_sent: int | None = None
    edge_received: int | None = None
    edge_sent: int | None = None
    split_latency_s: float | None = None
    backdoor: float | None = None
    without_trigger: float | None = None
    epsilon: float | None = None
    refused: int = 0
    lost: int = 0

    @property
    def honest(self) -> list[DeviceOutcome]:
        """The devices that do not attack."""
        return [device for device in self.devices if not device.attacker]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Outcome:
        """The inverse of `as_dict`. Raises `SflError` for anything else."""
        try:
            return _OUTCOME.validate_python(values)
        except ValidationError as error:
            raise SflError(f"no outcome of a run: {error.errors(include_url=False)[0]['msg']}") from None


_OUTCOME = TypeAdapter(Outcome)
