"""Thousands of rounds: no daemon takes more memory or files at their end than it did early on."""

from __future__ import annotations

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
        files = len(list(Path(f"/proc/{self.pid}/fd").iterdir()))
        self.samples.append((version, resident_mb(self.pid) or 0.0, files))

    def slope(self, versions: int) -> tuple[float, float]:
        """MB and files a version, of the line with least squares through the last three quarters."""
        late = np.array([sample for sample in self.samples if sample[0] >= versions / 4], dtype=float)
        mb, files = (float(np.polyfit(late[:, 0], late[:, column], 1)[0]) for column in (1, 2))
        return mb, files


@pytest.mark.parametrize(
    ("rounds", "most_mb"),
    [
        (60, 6.0),
        pytest.param(2000, 1.5, marks=pytest.mark.slow),
    ],
)
def test_memory_and_open_files_are_flat(tmp_path: Path, rounds: int, most_mb: float) -> None:
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
                assert daemon.process.poll() is None, f"{name} has ended:\n{daemon.log}"
                growths[name].look(version)
            time.sleep(_LOOK_S)
        for device in devices:
            assert daemons[device.name].wait() == 0, daemons[device.name].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
        assert daemons["fed"].events("end")[0]["version"] == rounds
    print(f"\n{rounds} rounds of {len(devices)} devices in {time.monotonic() - started:.0f} s")
    late = 0.75 * rounds
    for name, growth in growths.items():
        (mb, files), (_, last_mb, last_files) = growth.slope(rounds), growth.samples[-1]
        print(f"{name}: {last_mb:.1f} MB, {mb * 1000:+.2f} in 1,000 rounds; {last_files} open files, {files * 1000:+.2f}")
        assert late * mb < most_mb, f"{name} has taken {late * mb:.1f} MB more in {late:.0f} rounds"
        assert abs(late * files) < 2, f"{name} has {late * files:+.1f} open files in {late:.0f} rounds"
