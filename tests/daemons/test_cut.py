"""The network between two daemons is cut for a while: training goes on where it was, and nobody is started again."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from sfl.cluster.plan import free_addresses
from sfl.fed_server import ledger
from sfl.settings import FedSettings, StrategySettings, TlsSettings
from tests.daemons.machines import ADDRESSES, Machines, needs_root
from tests.daemons.processes import Daemon, Daemons
from tests.daemons.relay import Relay
from tests.daemons.runs import device_settings, edge_settings, stop_servers
from tests.flows import write_texts
from tests.tiny import save_tiny_model

DEVICE = "camera"
ROUND = 5  # steps; the device waits for the federation server after each


def start(daemons: Daemons, folder: Path, steps: int, listen: dict[str, str], dial: dict[str, str], plaintext: bool) -> None:
    """A federation server, an edge server and a device, each with the addresses that it listens on, and that others dial."""
    tls = TlsSettings(plaintext=plaintext)
    strategy = StrategySettings(name="fedavg", local_steps=ROUND)
    data = write_texts(folder / "texts.txt", 120)
    device = device_settings(DEVICE, save_tiny_model(folder / "model", "opt"), data, cut=2, steps=steps, tls=tls)
    edge = edge_settings("edge", device, listen=listen["edge"], federation=dial["fed from edge"], tls=tls)
    daemons.start("fed", FedSettings(devices=1, listen=listen["fed"], strategy=strategy, tls=tls))
    daemons.start("edge", edge)
    daemons.start("device", device.model_copy(update={"edge": dial["edge"], "federation": dial["fed"]}))


def has_done(steps: int) -> Callable[[Daemon], bool]:
    return lambda daemon: len(daemon.events("step")) >= steps


def finish(daemons: Daemons, steps: int) -> float:
    """Wait for the end of the run, which is as if nothing had been; the longest time without a step, in seconds."""
    assert daemons[DEVICE].wait(100) == 0, daemons[DEVICE].log
    assert stop_servers(daemons) == {"edge": 0, "fed": 0}
    for daemon in daemons.by_name.values():
        assert "Traceback" not in daemon.log, daemon.log
        assert not daemon.events("resume") and not daemon.events("move"), "something was gone back behind"
    done = daemons[DEVICE].events("step")
    assert [event["step"] for event in done] == list(range(1, steps + 1))
    balance = ledger.check(daemons["fed"].out)
    assert balance == ledger.Balance(accepted=steps // ROUND, counted=steps // ROUND)
    return max(float(later["t"] - earlier["t"]) for earlier, later in pairwise(done))


def test_a_way_that_is_silent_for_three_seconds_costs_three_seconds(tmp_path: Path) -> None:
    steps, cut_s = 40, 3.0
    fed, edge = free_addresses(2)
    with Daemons(tmp_path / "run", forked=True) as daemons, Relay(edge) as to_edge, Relay(fed) as to_fed:
        dial = {"edge": to_edge.address, "fed from edge": to_fed.address, "fed": fed}
        start(daemons, tmp_path, steps, {"fed": fed, "edge": edge}, dial, plaintext=False)
        lost = []
        for relay, at in ((to_edge, 3), (to_fed, 20)):
            daemons[DEVICE].until(has_done(at))
            relay.cut()
            begun, before = time.monotonic(), len(daemons[DEVICE].events("step"))
            time.sleep(cut_s)
            assert len(daemons[DEVICE].events("step")) <= before + ROUND + 1
            relay.mend()
            daemons[DEVICE].until(has_done(before + ROUND + 2))
            lost.append(time.monotonic() - begun)
        finish(daemons, steps)
    assert all(cut_s < each < 3 * cut_s for each in lost), lost  # a stream that is given up for lost costs 20 s


def unplug(machines: Machines) -> Callable[[], None]:
    machines.unplug(DEVICE)
    return lambda: machines.plug(DEVICE)


def part(one: str, other: str, both: bool = True) -> Callable[[Machines], Callable[[], None]]:
    """Nothing gets from one machine to the other, or, if `both`, from either to either."""
    ways = [(one, other), (other, one)] if both else [(one, other)]

    def cut(machines: Machines) -> Callable[[], None]:
        for way in ways:
            machines.part(*way)
        return lambda: [machines.join(*way) for way in ways] and None

    return cut


@pytest.mark.slow
@needs_root
@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(part(DEVICE, "edge"), id="device and edge server"),
        pytest.param(part("edge", DEVICE, both=False), id="edge server to device alone"),
        pytest.param(unplug, id="the device's cable"),
        pytest.param(part("edge", "fed"), id="edge server and federation server"),
    ],
)
def test_a_cut_of_thirty_seconds(
    machines: Machines, tmp_path: Path, cut: Callable[[Machines], Callable[[], None]], request: pytest.FixtureRequest
) -> None:
    steps, cut_s = 600, 30.0
    at = {"fed": f"{ADDRESSES['fed']}:7300", "edge": f"{ADDRESSES['edge']}:7301"}
    before = {name: machines.command(name) for name in ("fed", "edge", DEVICE)}
    with Daemons(tmp_path / "run", before=before) as daemons:
        start(daemons, tmp_path, steps, at, {**at, "fed from edge": at["fed"]}, plaintext=True)
        daemons[DEVICE].until(has_done(50))
        mend = cut(machines)
        time.sleep(cut_s)
        assert len(daemons[DEVICE].events("step")) < steps
        mend()
        pause_s = finish(daemons, steps)
    name = request.node.callspec.id
    print(f"\n{name}: cut for {cut_s:g} s, {pause_s:.1f} s between two steps: {pause_s - cut_s:.1f} s lost beside the cut")
    assert cut_s - 2 < pause_s < 2 * cut_s
