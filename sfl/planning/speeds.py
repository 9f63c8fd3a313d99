"""How long a step takes, from what is known of the device, the edge and the link between them."""

from __future__ import annotations

from dataclasses import dataclass

from sfl.planning.calibration import Calibration
from sfl.planning.request import PlanRequest
from sfl.planning.step_bytes import StepBytes

EDGE_OVER_DEVICE = 10.0  # how much faster an edge is taken to be where its speed is not given
_MBIT, _RTT_MS = 100.0, 2.0  # of a link that is not described: a wired one nearby


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: computing on the device, frames on their way, computing at the edge; `step` is from one step to
    the next, which is longer than the three together where the edge has more to do for all devices."""

    device: float
    link: float
    edge: float
    step: float


@dataclass(frozen=True)
class Speeds:
    """10**9 operations a second, Mbit/s and ms; `device_gflops` is None where it is not known. `assumed` says in words what
    was neither given nor measured."""

    device_gflops: float | None
    edge_gflops: float | None
    bandwidth_mbit: float
    rtt_ms: float
    assumed: tuple[str, ...]

    def step(self, device_flops: int, edge_flops: int, wire: StepBytes, devices: int) -> StepTime | None:
        """Seconds of a step of one of `devices` devices with one edge, None where the device's speed is not known.

        The edge computes one step at a time: step = max(device + link + edge, devices x edge).
        """
        if self.device_gflops is None or self.edge_gflops is None:
            return None
        device, edge = device_flops / self.device_gflops / 1e9, edge_flops / self.edge_gflops / 1e9
        link = 8 * (wire.up + wire.down) / self.bandwidth_mbit / 1e6 + self.rtt_ms / 1e3
        return StepTime(device, link, edge, max(device + link + edge, devices * edge))


def speeds_of(request: PlanRequest, calibration: Calibration) -> Speeds:
    """What was asked for goes before what was measured; the rest is assumed."""
    device = request.device_gflops or calibration.gflops.get(request.precision)
    assumed = []
    edge = request.edge_gflops
    if edge is None:
        assumed.append(f"an edge {EDGE_OVER_DEVICE:g} times as fast as the device")
        edge = None if device is None else EDGE_OVER_DEVICE * device
    if device is not None and request.bandwidth_mbit is None:
        assumed.append(f"a link of {_MBIT:g} Mbit/s")
    if device is not None and request.rtt_ms is None:
        assumed.append(f"a round trip of {_RTT_MS:g} ms")
    return Speeds(
        device,
        edge,
        request.bandwidth_mbit or _MBIT,
        _RTT_MS if request.rtt_ms is None else request.rtt_ms,
        tuple(assumed),
    )
