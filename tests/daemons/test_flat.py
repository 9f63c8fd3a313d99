"""Thousands of rounds: no daemon takes more memory or files at their end than it did early on."""

from __future__ import annotations

import contextlib
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from sfl.cluster.metrics import Follower
from sfl.profiling.process_memory import resident_mb
from sfl.settings import StrategySettings
from tests.daemons.processes import Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all, stop_servers
from tests.tiny import save_tiny_model

_LOOK_S = 0.25


@dataclass
class Growth:
    """What a process has, at several versions of a run."""

    pid: int
    samples: list[tuple[int, float, int]] = field(default_factory=list)  # version, resident MB, open files

    def look(self, version: int) -> None:
        """A sample more; none of a process that has ended."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            files, mb = len(list(Path(f"/proc/{self.pid}/fd").iterdir())), resident_mb(self.pid)
            if mb:  # not even a process that nobody has waited for yet has memory after its end
                self.samples.append((version, mb, files))

    def slope(self, since: float) -> tuple[float, float]:
        """MB and files in 1,000 versions, of the line with least squares through the samples from version `since` on."""
        late = np.array([sample for sample in self.samples if sample[0] >= since], dtype=float)
        mb, files = (1000 * float(np.polyfit(late[:, 0], late[:, column], 1)[0]) for column in (1, 2))
        return mb, files


def test_what_has_ended_gives_no_sample() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    growth = Growth(process.pid)
    growth.look(1)
    process.communicate(b"\n")
    growth.look(2)
    assert [version for version, _, _ in growth.samples] == [1]


# Nothing is kept of each round: versions of this adapter would be 9 MB in 1,000 rounds. What there is comes from allocators that
# settle late, and from CPython's table of interned strings, to which pathlib adds each new name of a file: once, after 600 or 700
# rounds, it is made anew at twice its size, 1 MB more in the federation server and 2 MB in a device. CPython 3.12 keeps such
# strings for ever, up to 1 MB in 1,000 rounds.
@pytest.mark.parametrize(
    ("rounds", "most_mb", "most_mb_late", "most_files"),
    [
        (40, math.inf, math.inf, 100.0),  # in so few rounds only files can be told from what settles late
        pytest.param(2000, 3.0, 1.5, 1.0, marks=pytest.mark.slow),
    ],
)
def test_memory_and_open_files_are_flat(
    tmp_path: Path, rounds: int, most_mb: float, most_mb_late: float, most_files: float
) -> None:
    """Slopes in 1,000 rounds: of the last three quarters, and of the last half; of few rounds those of files alone."""
    model = save_tiny_model(tmp_path / "model", "bert")
    devices = several_devices(tmp_path, model, (1, 2), steps=rounds, report_s=1)
    started = time.monotonic()
    with Daemons(tmp_path / "run", forked=rounds < 1000) as daemons:
        start_all(daemons, StrategySettings(name="fedavg", local_steps=1), [edge_settings("edge", devices[0])], devices)
        growths = {name: Growth(daemon.process.pid) for name, daemon in daemons.by_name.items()}
        follower, version = Follower(daemons["fed"].out / "metrics.jsonl"), 0
        while version < 0.99 * rounds:
            version = max([version, *(event["version"] for event in follower.new() if event["event"] == "aggregate")])
            for name, daemon in daemons.by_name.items():
                growths[name].look(version)
                if daemon.process.poll() is not None:  # in a short run devices may be through before their last version is read
                    assert daemon.process.poll() == 0 and name.startswith("device"), f"{name} has ended:\n{daemon.log}"
            time.sleep(_LOOK_S)
        for device in devices:
            assert daemons[device.name].wait() == 0, daemons[device.name].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
        assert daemons["fed"].events("end")[0]["version"] == rounds
    print(f"\n{rounds} rounds of {len(devices)} devices in {time.monotonic() - started:.0f} s")
    for name, growth in growths.items():
        (mb, files), (mb_late, _), (_, last_mb, last_files) = (
            growth.slope(rounds / 4),
            growth.slope(rounds / 2),
            growth.samples[-1],
        )
        print(f"{name}: {last_mb:.1f} MB, {mb:+.2f} in 1,000 rounds, {mb_late:+.2f} in the last half;", end=" ")
        print(f"{last_files} open files, {files:+.2f} in 1,000 rounds")
    slopes = {name: (*growth.slope(rounds / 4), growth.slope(rounds / 2)[0]) for name, growth in growths.items()}
    assert all(mb < most_mb and files < most_files and late < most_mb_late for mb, files, late in slopes.values())
