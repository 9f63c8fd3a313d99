"""What a device's uplink to the federation server can do, from the transfers that it has made so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from sfl.v1.federation_pb2 import Link

_RECENT = 5  # uploads that count; twice as many round trips
_LEAST_SHARE = 0.1  # of an upload's seconds that are transfer: one that was all round trip says little of the rate


@dataclass(frozen=True)
class Upload:
    """An upload that arrived: payload bytes, seconds with all tries and the pauses between them, tries that failed."""

    size: int
    seconds: float
    failures: int


class LinkMeter:
    """Moving estimates of a link; told of each transfer (`sfl.wire.federation.Uplink`), it predicts the next upload's seconds.

    The round trip is the shortest of the last ten small calls, as whatever else they wait for only adds to it. The
    throughput is that of the last five uploads without the slowest of them, so that one outlier does not matter; what tries that
    failed have taken is part of an upload's seconds, so a link that often fails is a slow one.
    """

    def __init__(self) -> None:
        self._uploads: deque[Upload] = deque(maxlen=_RECENT)
        self._round_trips: deque[float] = deque(maxlen=2 * _RECENT)

    def uploaded(self, size: int, seconds: float, failures: int) -> None:
        """An upload of `size` payload bytes took `seconds`, in which `failures` tries failed before the last one arrived."""
        self._uploads.append(Upload(size, seconds, failures))

    def answered(self, seconds: float) -> None:
        """A small call was answered after `seconds`."""
        self._round_trips.append(seconds)

    @property
    def latest(self) -> Upload | None:
        """The last upload."""
        return self._uploads[-1] if self._uploads else None

    @property
    def round_trip_s(self) -> float:
        """Seconds from a question to its answer; 0 while nothing is known."""
        return min(self._round_trips, default=0.0)

    @property
    def bytes_per_s(self) -> float | None:
        """Payload bytes a second once an upload flows, its round trip not counted; None before the first."""
        kept = sorted(self._uploads, key=lambda upload: upload.seconds / max(upload.size, 1))
        kept = kept[: max(1, len(kept) - 1)]
        if not kept:
            return None
        flowing = sum(max(upload.seconds - self.round_trip_s, _LEAST_SHARE * upload.seconds) for upload in kept)
        return sum(upload.size for upload in kept) / max(flowing, 1e-9)

    def upload_s(self, size: int) -> float | None:
        """Seconds that an upload of `size` payload bytes will take; None before the first."""
        rate = self.bytes_per_s
        return None if rate is None else self.round_trip_s + size / max(rate, 1e-9)

    def report(self) -> Link | None:
        """The estimates for the federation server; None before the first upload."""
        rate = self.bytes_per_s
        return None if rate is None else Link(bytes_per_s=rate, round_trip_s=self.round_trip_s)

    def state(self) -> dict[str, Any]:
        """The transfers that its estimates rest on, JSON-serialisable."""
        return {"uploads": [astuple(upload) for upload in self._uploads], "round_trips": list(self._round_trips)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where the meter was whose `state` this is."""
        self._uploads.clear()
        self._uploads.extend(Upload(*upload) for upload in state["uploads"])
        self._round_trips.clear()
        self._round_trips.extend(state["round_trips"])
