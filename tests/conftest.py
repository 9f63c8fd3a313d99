"""For all tests: one thread for each process, as tiny models gain nothing from more and lose much where cores are shared."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before anything imports torch; child processes have it, too
