"""For all tests: one thread for each process, as tiny models gain nothing from more and lose much where cores are shared; and the
log as it was, whatever a test has configured."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from sfl.telemetry import log

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch; child processes have it, too


@pytest.fixture(autouse=True)
def _log_as_it_was() -> Iterator[None]:
    kept = log.handlers[:], log.level, log.propagate
    yield
    log.handlers[:], log.propagate = kept[0], kept[2]
    log.setLevel(kept[1])
