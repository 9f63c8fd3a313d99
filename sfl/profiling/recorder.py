"""Watches this process while it works: its memory over time, by phase, at a few moments, and the energy of its steps.

Light: what it imports is no more than a device has anyway, so that it can begin before torch is imported.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sfl.allocator import heap_figures
from sfl.phases import IDLE, watching
from sfl.profiling.board.energy import Meter
from sfl.profiling.process_memory import process_memory, resident_mb, seconds_since_start, status_mb
from sfl.profiling.timeline import COUNT, Series, Timeline
from sfl.telemetry import peak_rss_mb, peak_since_restart_mb, restart_peak

if TYPE_CHECKING:
    from sfl.model.cut import DeviceHalf
    from sfl.model.local_adapter import LocalAdapter
    from sfl.profiling.parts import DeviceParts, Held
    from sfl.settings import DeviceSettings
    from sfl.wire.frames import Traffic

INTERVAL_S = 0.01
_EXACT_EVERY_S = 0.1  # PSS and USS cost the kernel a walk over all pages
_EXACT_SHARE = 0.03  # of the time, at most


@dataclass(frozen=True)
class Moment:
    """MB at one moment, `at_s` after the start: the kernel's figures, and the C heap's: what it has from the system
    (`arena_mb`), what of that is in use and free, and large blocks beside it (`mapped_mb`). None: not measured."""

    at_s: float
    rss_mb: float | None
    pss_mb: float | None
    uss_mb: float | None
    swap_mb: float | None
    arena_mb: float | None
    used_mb: float | None
    free_mb: float | None
    mapped_mb: float | None


@dataclass(frozen=True)
class AtPeak:
    """The phase with the highest peak: its name, the step it was in (from 1; 0 before the first), and what was held."""

    phase: str
    step: int
    file_mb: float | None
    held: Held | None


class Recorder:
    """Records from `with` to its end. `observe` tells it what to count; without, there are no parts but the floor."""

    def __init__(self, meter: Meter | None = None, phase: str = "import") -> None:
        self.meter = meter
        self.settings: DeviceSettings | None = None  # those in force, once they are known
        self.moments: dict[str, Moment] = {}
        self.uss = Series()
        self.pss = Series()
        self.at_peak: AtPeak | None = None
        self.steps = 0
        self.floor_mb: float | None = None
        self.floor_file_mb: float | None = None
        self.joules: float | None = None
        self.energy_steps = 0
        self.resets_peak = False
        self.parts: DeviceParts | None = None
        self._origin = time.monotonic() - (seconds_since_start() or 0.0)
        self.timeline = Timeline(phase, resident_mb() or 0.0)
        self.timeline.add(self._now(), resident_mb() or 0.0)
        self._first = self._phase = phase
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._exact_due = 0.0
        self._metering = False

    @contextmanager
    def recording(self) -> Iterator[Recorder]:
        """Watch until the block ends, however it ends."""
        sampler = threading.Thread(target=self._sample, name="profile", daemon=True)
        sampler.start()
        try:
            with watching(self._enter):
                yield self
        finally:
            self._stop.set()
            sampler.join(timeout=5)
            self._change(IDLE)
            self.moments["at the end"] = self._moment(self._now())

    def observe(self, half: DeviceHalf, adapter: LocalAdapter, traffic: Traffic, count_in_step: int) -> None:
        """From here on, note at each new peak what these hold; `traffic` is that of the link to the edge.

        In one step, numbered from 1, tensors are counted as they come and go. It has no part in the peak and the phases.
        """
        from sfl.profiling.parts import DeviceParts

        self.parts = DeviceParts(half, adapter, traffic, count_in_step)

    def _enter(self, phase: str) -> None:
        if phase != self._phase:  # as the imports, which had begun before this was there to watch
            self._change(phase)

    def _change(self, phase: str) -> None:
        ended, aside = self._phase, self.timeline.phase == COUNT
        if self.parts is not None:
            self.parts.phase_ends(ended)
        rss = resident_mb() or peak_rss_mb()
        with self._lock:
            now = self._now()
            # The kernel's own peak since the last change, if it could be asked to begin anew there.
            exact = peak_since_restart_mb() if self.resets_peak or self.timeline.peak is None else None
            self.resets_peak = restart_peak()
            new_peak = self.timeline.end(now, rss, exact)
            self.timeline.phase = IDLE  # until what follows is done
        of_step = self.steps + 1 if ended in _IN_A_STEP else self.steps
        self.steps += ended == "step"
        if not aside:
            self._note(ended, of_step, now, rss, new_peak)
        if self.parts is not None:
            self.parts.phase_begins(phase)
        if phase == "forward" and not self.steps:
            self._measure_energy(now)
        with self._lock:
            self._phase, self.timeline.phase = phase, COUNT if self.parts is not None and self.parts.aside else phase

    def _note(self, ended: str, of_step: int, now: float, rss: float, new_peak: bool) -> None:
        """What is to be known where a phase ends."""
        if ended in (self._first, "import") and "after loading" not in self.moments:  # a daemon looks around before its imports
            self.floor_mb, self.floor_file_mb = rss, status_mb("RssFile")
            self.moments["after the imports"] = self._moment(now)
        elif ended == "load":
            self.moments["after loading"] = self._moment(now)
        if new_peak:
            self.at_peak = AtPeak(ended, of_step, status_mb("RssFile"), self._held())
            self.moments["after the phase of the peak"] = self._moment(now)
        if ended == "step":
            self._measure_energy(now)

    def _held(self) -> Held | None:
        return None if self.parts is None else self.parts.held()

    def _measure_energy(self, now: float) -> None:
        self._metering = True
        if self.meter is not None:
            with self._lock:
                self.meter.tick(now)
                self.joules, self.energy_steps = self.meter.joules, self.steps

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            rss = resident_mb()
            with self._lock:
                now = self._now()
                if rss is not None:
                    self.timeline.add(now, rss)
            if now >= self._exact_due:
                self._sample_exactly(now)

    def _sample_exactly(self, now: float) -> None:
        began = time.thread_time()  # not the clock: waiting for Python's lock costs nobody anything
        exact = process_memory()
        took = time.thread_time() - began
        self._exact_due = now + max(_EXACT_EVERY_S, took / _EXACT_SHARE)
        if exact.uss_mb is not None and exact.pss_mb is not None:
            self.uss.add(now, exact.uss_mb)
            self.pss.add(now, exact.pss_mb)
        if self.meter is not None and self._metering:
            with self._lock:
                self.meter.tick(now)

    def _moment(self, now: float) -> Moment:
        exact, heap = process_memory(), heap_figures() or {}
        figures = {f"{name}_mb": heap[name] / 1e6 if name in heap else None for name in ("arena", "used", "free", "mapped")}
        return Moment(now, exact.rss_mb, exact.pss_mb, exact.uss_mb, exact.swap_mb, **figures)

    def _now(self) -> float:
        return time.monotonic() - self._origin


_IN_A_STEP = ("forward", "wait", "backward", "step")
