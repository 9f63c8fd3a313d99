"""Daemons that are killed or told to stop in the middle of a run: the others go on, or end with a reason."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sfl.cluster.plan import free_addresses
from sfl.settings import FedSettings, StrategySettings
from tests.daemons.processes import Daemon, Daemons
from tests.daemons.runs import edge_settings, several_devices, start_all
from tests.tiny import save_tiny_model

VICTIM, FINISHER, ENDLESS = "device-1", "device-2", "device-3"
STEPS = {"gsfs": 120, "fedavg": 30}  # of the finisher: rounds are in lockstep, GSFS's devices are not
STRATEGIES = {
    "gsfs": StrategySettings(name="gsfs", quorum=0.6, beta=0, min_steps=3, validate_every=0),
    "fedavg": StrategySettings(name="fedavg", local_steps=3),
}


def has_done(steps: int) -> Callable[[Daemon], bool]:
    return lambda daemon: len(daemon.events("step")) >= steps


def test_an_edge_server_that_waits_for_the_others_ends_when_it_is_told_to(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", "bert")
    (device,) = several_devices(tmp_path, model, (1,))  # which never comes
    fed, *listen = free_addresses(3)
    with Daemons(tmp_path / "run", forked=True) as daemons:
        daemons.start("fed", FedSettings(devices=1, listen=fed))
        told = {"one": signal.SIGTERM, "two": signal.SIGINT}
        for name, address in zip(told, listen, strict=True):
            daemons.start("edge", edge_settings(name, device, listen=address, federation=fed))
        daemons["fed"].until(lambda fed: len(fed.events("join")) == 2)
        for name, number in told.items():
            daemons[name].until(lambda edge: "listens on" in edge.log)
            daemons[name].process.send_signal(number)
        for name in told:
            daemons[name].until(lambda edge: "has stopped" in edge.log, 3)
            assert daemons[name].wait(20) == 0  # on a busy machine the interpreter's own end takes seconds
            assert "Traceback" not in daemons[name].log, daemons[name].log


@pytest.mark.parametrize(
    ("strategy", "first", "lost"),
    [
        ("gsfs", "edge", "the edge server"),
        pytest.param("fedavg", "fed", "the federation server", marks=pytest.mark.slow),
    ],
)
def test_the_others_go_on_without_a_killed_device_and_end_without_a_server(
    tmp_path: Path, strategy: str, first: str, lost: str
) -> None:
    """Kill a device, see another one end well, then stop a server under a third one.

    With gsfs by `sfl` as a user starts it: how a process ends, and what that leaves to the others, also depends on its start.
    """
    model = save_tiny_model(tmp_path / "model", "bert")
    steps = (1_000_000, STEPS[strategy], 1_000_000)
    devices = several_devices(tmp_path, model, (1, 2, 3), give_up_s=2)
    devices = tuple(device.model_copy(update={"steps": count}) for device, count in zip(devices, steps, strict=True))
    with Daemons(tmp_path / "run", forked=strategy != "gsfs") as daemons:
        start_all(daemons, STRATEGIES[strategy], [edge_settings("edge", devices[0])], devices, away_after_s=1)
        daemons[FINISHER].until(has_done(1))
        daemons[VICTIM].until(has_done(7))
        daemons[VICTIM].kill()
        died = time.time()

        assert daemons[FINISHER].wait() == 0, daemons[FINISHER].log
        (end,) = daemons[FINISHER].events("end")
        assert end["steps"] == STEPS[strategy] and end["t"] > died
        later = [event["devices"].keys() for event in daemons["fed"].events("aggregate") if event["t"] > died]
        assert {FINISHER, ENDLESS} in later, later
        assert f"{VICTIM} is gone after step" in daemons["edge"].log
        done = len(daemons[ENDLESS].events("step"))
        daemons[ENDLESS].until(has_done(done + 3))

        second = {"edge": "fed", "fed": "edge"}[first]
        assert daemons[first].stop() == 0, daemons[first].log
        assert daemons[ENDLESS].wait() == 1
        error = daemons[ENDLESS].log.splitlines()[-1]
        assert error.startswith("error SFL-700: ") and lost in error and "gave up after" in error, error
        assert daemons[second].stop() == 0, daemons[second].log
        for name in (first, second):
            assert daemons[name].events()[-1]["event"] == "end"
            assert "Traceback" not in daemons[name].log, daemons[name].log
        assert VICTIM not in daemons["fed"].events("aggregate")[-1]["devices"]
