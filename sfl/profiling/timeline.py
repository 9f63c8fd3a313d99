"""Resident memory over time and by phase, in bounded space however long the run."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfl.phases import IDLE

COUNT = "count"  # the phases of a step in which tensors are counted, all in one: counting takes memory itself
MOST_POINTS = 4000
CLEARLY = 1.005  # by this a phase has to be above the peak so far: what is freed late would give it to the next phase
MOST_SPANS = 2000  # later ones are in the totals alone


@dataclass(frozen=True)
class Span:
    """One stay in a phase: from `start_s` to `end_s`, with the highest RSS in it."""

    phase: str
    start_s: float
    end_s: float
    peak_mb: float


@dataclass
class PhaseTotal:
    """All stays in one phase: how often, how long, the highest RSS, and the mean over time (`mb_seconds / seconds`)."""

    count: int = 0
    seconds: float = 0.0
    peak_mb: float = 0.0
    mb_seconds: float = 0.0
    last_mb: float = 0.0

    @property
    def mean_mb(self) -> float:
        return self.mb_seconds / self.seconds if self.seconds else self.last_mb


@dataclass
class Series:
    """Points (seconds, MB); when there are too many, each two that follow one another become the higher one of them."""

    points: list[tuple[float, float]] = field(default_factory=list)
    _every: int = 1
    _pending: list[tuple[float, float]] = field(default_factory=list)

    def add(self, at_s: float, mb: float) -> None:
        self._pending.append((at_s, mb))
        if len(self._pending) == self._every:
            self.points.append(max(self._pending, key=lambda point: point[1]))
            self._pending.clear()
        if len(self.points) > MOST_POINTS:
            pairs = zip(self.points[::2], self.points[1::2])
            self.points = [max(pair, key=lambda point: point[1]) for pair in pairs]
            self._every *= 2


class Timeline:
    """Collects RSS and the changes of phase. Not for several threads at once; whoever has them locks."""

    def __init__(self, phase: str, mb: float) -> None:
        """In `phase` since 0 s, at which time RSS was `mb`."""
        self.phase = phase
        self.rss = Series()
        self.spans: list[Span] = []
        self.totals: dict[str, PhaseTotal] = {}
        self.peak: Span | None = None
        self.peak_at_s = 0.0
        self._start_s = 0.0
        self._last = (0.0, mb)
        self._highest = (0.0, 0.0)  # point of this span

    def add(self, at_s: float, mb: float) -> None:
        """RSS at one moment."""
        before_s, before_mb = self._last
        total = self.totals.setdefault(self.phase, PhaseTotal())
        total.mb_seconds += (at_s - before_s) * (mb + before_mb) / 2
        total.seconds += at_s - before_s
        total.last_mb = mb
        self._last = at_s, mb
        if mb >= self._highest[1]:
            self._highest = at_s, mb
        self.rss.add(at_s, mb)

    def end(self, at_s: float, mb: float, peak_mb: float | None) -> bool:
        """End the phase; `peak_mb` is the kernel's own since the last end. Whether the phase had clearly the highest so far."""
        self.add(at_s, mb)
        highest = max(self._highest[1], peak_mb or 0.0)
        span = Span(self.phase, self._start_s, at_s, highest)
        total = self.totals[self.phase]
        total.count += 1
        total.peak_mb = max(total.peak_mb, highest)
        new_peak = self.phase != COUNT and (self.peak is None or highest > CLEARLY * self.peak.peak_mb)
        if new_peak:
            self.peak, self.peak_at_s = span, self._highest[0]
        if span.phase != IDLE and len(self.spans) < MOST_SPANS:
            self.spans.append(span)
        self._start_s, self._highest = at_s, (at_s, mb)
        return new_peak

    @property
    def peak_mb(self) -> float:
        """The highest RSS of all phases that have ended, but for what is counted aside."""
        return max((total.peak_mb for name, total in self.totals.items() if name != COUNT), default=0.0)
