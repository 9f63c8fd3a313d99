"""How much memory a half takes in training: the one formula that every plan uses.

A device's peak is, in bytes,

    floor + weights + adapter + max(forward, wait, backward) + slack

- floor: a device that trains a model of next to no size, as calibrated: imports, code that computing pages in, gRPC.
- weights: the half's weights and buffers in their precision. Embedding tables stay in their file: only the rows of a batch
  are read, and they count with the activations.
- adapter: A and B in fp32, the anchor that progress is counted from, and the optimiser's moments (two with AdamW, none
  with SGD).
- forward, backward: the tensors alive at most in that pass, as `sfl.planning.trace` counts them in the real modules;
  backward adds the received gradient, which grows as it arrives to at most `_GROWN` times its size, and the adapter's.
- wait: what backward needs and the activation, with the frames of the step on their way.
- slack: `_SLACK_MB` for the small blocks of larger models and the code that pages in with them, `_AGAIN_MB` where something
  is computed again for backward, and a share `_SLACK` of the tensors that come and go.

This holds with `tight_memory`, where large blocks of memory are mapped one by one (`sfl.allocator`). Without it, as where there
is plenty, the heap may hold as much again as is alive. Not counted are the device's texts: 8 bytes a token, and the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sfl.planning.step_bytes import StepBytes
from sfl.planning.trace import DeviceTrace, EdgeTrace

_SLACK_MB, _AGAIN_MB, _SLACK = 10.0, 7.0, 0.02
_EDGE_HEAP = 0.9  # what an edge's heap holds beyond a step's tensors, as a share of them: there large blocks are not mapped
_GROWN = 1.125  # a bytearray's room to grow
_IN_FLIGHT = 2  # copies of a step's bytes: frames that wait, and those that gRPC is sending or has received


@dataclass(frozen=True)
class DeviceMemory:
    """MB (10**6 bytes) by part; the parts add up to `peak`, which is reached in `phase`.

    `activations` are what backward needs and the activation itself, `temporary` what else is alive at the peak: one block's
    intermediate results, gradients, frames.
    """

    floor: float
    weights: float
    adapter: float
    activations: float
    temporary: float
    slack: float
    phase: str

    @property
    def peak(self) -> float:
        return self.floor + self.weights + self.adapter + self.activations + self.temporary + self.slack


def device_memory(
    floor_mb: float, weights: int, adapter: int, moments: int, trace: DeviceTrace, cut: int, wire: StepBytes
) -> DeviceMemory:
    """Of a device cut at `cut`, with so many bytes of weights and of adapter (A and B once)."""
    waiting = trace.waiting(cut)
    phases = {
        "forward": trace.forward_peak(cut),
        "wait": waiting + _IN_FLIGHT * max(wire),
        "backward": trace.backward_peak(cut) + int(_GROWN * wire.down) + adapter,
    }
    phase = max(phases, key=lambda name: phases[name])
    return DeviceMemory(
        floor=floor_mb,
        weights=weights / 1e6,
        adapter=(2 + moments) * adapter / 1e6,
        activations=waiting / 1e6,
        temporary=(phases[phase] - waiting) / 1e6,
        slack=_SLACK_MB + _AGAIN_MB * trace.again + _SLACK * phases[phase] / 1e6,
        phase=phase,
    )


def checkpoint_mb(adapter: int, moments: int) -> float:
    """MB on disk of a device's checkpoint at most: A and B, what they began as and progress is counted from, the moments, and an
    update that is not sent yet."""
    return (4 + moments) * adapter / 1e6


def edge_memory(
    floor_mb: float,
    weights: int,
    adapter: int,
    moments: int,
    trace: EdgeTrace,
    cut: int,
    wire: StepBytes,
    devices: int,
) -> float:
    """MB of an edge that serves `devices` devices cut at `cut`: blocks and head once, and for each device its adapter with
    anchor, moments and the last gradient, which is kept to be asked for again. One step is computed at a time."""
    session = (2 + moments) * adapter + wire.down
    step = trace.peak(cut) + adapter + _IN_FLIGHT * max(wire)
    return floor_mb + (weights + devices * session + (1 + _EDGE_HEAP) * step) / 1e6


def total(parts: Mapping[int, int], first: int, last: int) -> int:
    """The sum of what layers `first` to `last` - 1 have."""
    return sum(size for layer, size in parts.items() if first <= layer < last)
