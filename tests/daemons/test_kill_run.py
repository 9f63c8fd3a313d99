"""All daemons of a run are killed at random moments: it ends, and each submission counts exactly once."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from sfl.adapters import peft_format
from sfl.cluster.metrics import read_events
from sfl.fed_server import contents, ledger
from sfl.fed_server.versions import version_numbers
from sfl.settings import StrategySettings
from tests.daemons.killer import Killer
from tests.daemons.processes import Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all, stop_servers
from tests.tiny import save_tiny_model

CUTS = (1, 2, 2, 3)
STRATEGIES = {
    "gsfs": StrategySettings(name="gsfs", quorum=0.5, min_steps=4, max_steps=8, validate_every=4),
    "fedavg": StrategySettings(name="fedavg", local_steps=5),
}


@pytest.mark.parametrize(
    ("strategy", "steps", "kills"),
    [
        ("gsfs", 45, 6),
        pytest.param("gsfs", 600, 100, marks=pytest.mark.slow),
        pytest.param("fedavg", 600, 100, marks=pytest.mark.slow),
    ],
)
def test_whatever_is_killed_each_submission_counts_once(tmp_path: Path, strategy: str, steps: int, kills: int) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    devices = several_devices(tmp_path, model, CUTS, steps=steps, checkpoint_steps=7)
    names = [device.name for device in devices]
    started = time.monotonic()
    with Daemons(tmp_path / "run", forked=True) as daemons:
        start_all(daemons, STRATEGIES[strategy], [edge_settings("edge", devices[0])], devices, keep_versions=0)
        killed = Killer(daemons, names, ("edge", "fed"), steps, kills, seed=7).run()
        for name in names:  # a device may have been killed when it had done all
            assert daemons[name].wait() in (0, -signal.SIGKILL), daemons[name].log
        assert stop_servers(daemons) == {"edge": 0, "fed": 0}
        for daemon in daemons.by_name.values():
            assert "Traceback" not in daemon.log, daemon.log
        (end,) = daemons["fed"].events("end")
    assert killed.total() == kills

    reported = set[tuple[str, str]]()  # what each device knows to be acknowledged
    for name in names:
        events = read_events(tmp_path / "run" / name / "metrics.jsonl")
        assert [event["step"] for event in events if event["event"] == "step"] == list(range(1, steps + 1))
        assert not [event for event in events if event["event"] == "move"], f"{name} has lost its session"
        reported |= {(name, event["submission"]) for event in events if event["event"] == "submit"}

    fed, adapters = tmp_path / "run" / "fed", tmp_path / "run" / "adapters"
    balance = ledger.check(fed, adapters)
    assert balance == ledger.Balance(accepted=len(reported), counted=len(reported))
    versions = sorted(version_numbers(adapters))
    held = [entry for version in versions for entry in contents.load(adapters, version).submissions]  # type: ignore[union-attr]
    assert Counter((entry.device, entry.submission) for entry in held) == Counter(reported)
    assert versions == list(range(end["version"] + 1)) and end["submissions"] == len(reported)
    for name in names:
        assert sum(entry.steps for entry in held if entry.device == name) == steps, f"not each step of {name} is in a version"
    peft_format.read(adapters / f"v{end['version']}")
    by_name = ", ".join(f"{name} {count}" for name, count in sorted(killed.items()))
    made = f"{len(CUTS) * steps} steps, {len(reported)} submissions in {end['version']} versions"
    print(f"\n{killed.total()} kills ({by_name}) in {time.monotonic() - started:.0f} s: {made}")
