"""Device and edge server, killed and started again: what comes of the run is what would have come of it, to the bit."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.adapters import peft_format
from sfl.cluster.metrics import read_events
from sfl.settings import DeviceSettings, LoraSettings, StrategySettings
from tests.daemons.killer import Killer
from tests.daemons.processes import Daemon, Daemons
from tests.daemons.runs import device_settings, edge_settings, several_devices, start_all, stop_servers
from tests.flows import write_texts
from tests.tiny import save_tiny_model

DEVICE, EDGE = "device-1", "edge"
STEPS, ROUND = 240, 20


def settings(folder: Path, steps: int = STEPS) -> DeviceSettings:
    return device_settings(
        DEVICE,
        save_tiny_model(folder / "model", "opt"),
        write_texts(folder / "texts.txt", 120),
        lora=LoraSettings(rank=4, alpha=8, dropout=0.2),
        cut=2,
        steps=steps,
        checkpoint_steps=7,
    )


def started(daemons: Daemons, device: DeviceSettings) -> None:
    start_all(
        daemons, StrategySettings(name="fedavg", local_steps=ROUND), [edge_settings(EDGE, device)], [device], keep_versions=0
    )


def finish(daemons: Daemons, count: int = STEPS) -> tuple[dict[str, Any], dict[int, float]]:
    """What the federation server reports at the end, and the loss of each of the device's steps."""
    assert daemons[DEVICE].wait(100) in (0, -signal.SIGKILL), daemons[DEVICE].log
    (end,) = daemons[DEVICE].events("end")
    assert end["steps"] == count
    assert stop_servers(daemons) == {"edge": 0, "fed": 0}
    for name in (DEVICE, EDGE, "fed"):
        assert "Traceback" not in daemons[name].log, daemons[name].log
    steps = [event for event in read_events(daemons[DEVICE].out / "metrics.jsonl") if event["event"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, count + 1))
    assert not list((daemons[DEVICE].out / "state").glob("*.state")), "the run has come to its end"
    assert not list((daemons[EDGE].out / "sessions").iterdir())
    return daemons["fed"].events("end")[0], {event["step"]: event["loss"] for event in steps}


def require_same(folder: Path, found: dict[str, Any], expected: dict[str, Any], disturbed: str = "disturbed") -> None:
    """The same figures of the federation server, and the same versions to the bit."""
    for what in ("version", "aggregations", "submissions"):
        assert found[what] == expected[what], what
    refused = [
        event["reason"] for event in read_events(folder / disturbed / "fed" / "metrics.jsonl") if event["event"] == "refused"
    ]
    assert len(refused) == found["refused"] and expected["refused"] == 0
    assert all("the stream ended before the last byte" in reason for reason in refused), (
        "of an upload in the middle of which one died"
    )
    for version in range(expected["version"] + 1):
        one, other = (peft_format.read(folder / run / "adapters" / f"v{version}")[0] for run in ("undisturbed", disturbed))
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[key], other[key]) for key in one), f"version {version} differs"


def step_of(daemon: Daemon) -> int:
    return max((event["step"] for event in daemon.events("step")), default=0)


def test_started_again_when_it_is_done_it_says_that_another_run_begins(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "opt")
    first, second = several_devices(tmp_path, model, [1, 1], steps=3)
    with Daemons(tmp_path, forked=True) as daemons:
        devices = [first, second.model_copy(update={"steps": 100_000})]
        start_all(daemons, StrategySettings(), [edge_settings(EDGE, first)], devices)
        assert daemons[DEVICE].wait() == 0, daemons[DEVICE].log
        said = "the earlier run of device-1 was done: another one begins"
        assert said not in daemons[DEVICE].log
        assert daemons.again(DEVICE).wait() == 0, daemons[DEVICE].log
        assert daemons[DEVICE].log.count(said) == 1
        assert [event["step"] for event in daemons[DEVICE].events("step")] == [1, 2, 3, 1, 2, 3]


@pytest.mark.parametrize(
    "deaths",
    [
        ((30, [DEVICE, EDGE]),),
        pytest.param(((30, [DEVICE]), (60, [EDGE]), (90, [DEVICE, EDGE]), (120, [EDGE, DEVICE])), marks=pytest.mark.slow),
    ],
    ids=["one", "many"],
)
def test_killed_or_stopped_and_started_again_it_comes_to_the_same(tmp_path: Path, deaths: Any) -> None:
    device = settings(tmp_path)
    with Daemons(tmp_path / "undisturbed", forked=True) as daemons:
        started(daemons, device)
        expected, losses = finish(daemons)

    with Daemons(tmp_path / "disturbed", forked=True) as daemons:
        started(daemons, device)
        for at, names in deaths:
            daemons[DEVICE].until(lambda daemon, at=at: step_of(daemon) >= at)  # type: ignore[misc]
            for name in names:
                daemons[name].kill()
            for name in names:
                daemons.again(name)
        last = deaths[-1][0]
        daemons[DEVICE].until(lambda daemon: step_of(daemon) >= last + 30)  # long before its end, however late that is seen
        assert daemons[DEVICE].stop() == 0, daemons[DEVICE].log
        stopped = step_of(daemons[DEVICE])
        assert f"stopped at step {stopped}; start it again with the same settings to go on" in daemons[DEVICE].log
        daemons.again(DEVICE)
        found, repeated = finish(daemons)
        resumes = daemons[DEVICE].events("resume")
        starts = 1 + sum(DEVICE in names for _, names in deaths)  # an edge server that dies at a checkpoint sets nobody back
        assert len(resumes) >= starts and resumes[-1]["step"] == stopped  # a stop in order loses no step
        assert not daemons[DEVICE].events("move")
    assert repeated == losses
    require_same(tmp_path, found, expected)


@pytest.mark.slow
def test_killed_at_random_moments_it_comes_to_the_same(tmp_path: Path) -> None:
    """The federation server, too."""
    steps, count = 600, 20
    device = settings(tmp_path, steps)
    with Daemons(tmp_path / "undisturbed", forked=True) as daemons:
        started(daemons, device)
        expected, losses = finish(daemons, steps)
    for seed in (1, 2):
        folder = tmp_path / f"disturbed-{seed}"
        begun = time.monotonic()
        with Daemons(folder, forked=True) as daemons:
            started(daemons, device)
            kills = Killer(daemons, [DEVICE], (EDGE, "fed"), steps, count, seed).run()
            found, repeated = finish(daemons, steps)
        assert kills.total() == count and repeated == losses
        require_same(tmp_path, found, expected, folder.name)
        print(f"\nkills: {dict(kills)} in {time.monotonic() - begun:.0f} s: {expected['version']} versions, the same to the bit")
