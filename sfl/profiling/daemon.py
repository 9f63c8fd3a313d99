"""A device daemon that records itself."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sfl.profiling.board.energy import energy_meter
from sfl.profiling.recorder import Recorder
from sfl.settings import DeviceSettings
from sfl.telemetry import log

FILE = "profile.json"
_ON_SIGTERM = 128 + signal.SIGTERM


@contextmanager
def recorded(settings: DeviceSettings) -> Iterator[Recorder]:
    """Record until the block ends, by an error or SIGTERM too, and write `profile.json` to `settings.out`.

    Only SIGKILL, and so the kernel when memory is out, leaves no file.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(_ON_SIGTERM))
    recorder = Recorder(energy_meter())
    try:
        with recorder.recording():
            yield recorder
    finally:
        from sfl.profiling.result import write_profile
        from sfl.profiling.summary import described, summarise

        path = settings.out / FILE
        try:
            write_profile(path, summarise(recorder, described(recorder.settings or settings)))
            log.info("the memory profile is in %s", path)
        except OSError as error:  # which is not to hide why the run ended
            log.error("the memory profile cannot be written: %s", error)
