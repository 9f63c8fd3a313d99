"""A training step of either half, run on the meta device: the real modules and the real passes, without a weight or a value.

One run of the longest half tells about every cut, as what a block does depends on no block above it on the device, and on
none below it at the edge.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sfl.data.settings import Task
from sfl.model.backward import backward_from
from sfl.model.cut import DeviceHalf, EdgeHalf
from sfl.model.lora import AdapterSlots
from sfl.model.precision import DTYPES
from sfl.model.recompute import forward_in_micro_batches, recompute_blocks
from sfl.planning.meter import Meter, as_on_cpu
from sfl.settings import Compute

_BEFORE, _AFTER = -1, 10**6  # where a pass is outside of the blocks


@dataclass
class Pass:
    """A pass over the blocks: for each block index the highest number of bytes alive in it, those alive when the next block
    was entered or the last one left, and the floating-point operations."""

    peak: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    left: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    flops: dict[int, int] = field(default_factory=lambda: defaultdict(int))

    def grow(self, size: int, times: float) -> None:
        """Count `size` more bytes alive all the time, and so many times the operations."""
        for block in self.peak:
            self.peak[block] += size
        for block in self.flops:
            self.flops[block] = round(self.flops[block] * times)


@dataclass(frozen=True)
class DeviceTrace:
    """A step of the device's half. `held` are the bytes alive between the passes of the longest half, which ends at `deepest`;
    `in_parts` says that the forward pass ran in micro-batches, of which nothing is kept but the activation, and `again` that
    something is computed once more for backward."""

    deepest: int
    held: int
    in_parts: bool
    again: bool
    forward: Pass
    backward: Pass

    def forward_peak(self, cut: int) -> int:
        """Bytes alive at most in the forward pass of the half that ends at `cut`."""
        inside = max(self.forward.peak[block] for block in (_BEFORE, *range(cut)))
        shorter = 0 if self.in_parts else self.forward.left[self.deepest - 1] - self.forward.left[cut - 1]
        return max(inside, self.forward.peak[_AFTER] - shorter)

    def waiting(self, cut: int) -> int:
        """Bytes alive between the passes: what backward needs, and the activation itself."""
        return self.held if self.in_parts else self.held - self.forward.left[self.deepest - 1] + self.forward.left[cut - 1]

    def backward_peak(self, cut: int) -> int:
        """Bytes alive at most in the backward pass, without the received gradient and the adapter's own gradients."""
        return max(self.backward.peak[block] for block in range(cut))

    def flops(self, cut: int) -> int:
        """Both passes, with what they compute once more."""
        return sum(part.flops[block] for part in (self.forward, self.backward) for block in (_BEFORE, *range(cut), _AFTER))


@dataclass(frozen=True)
class EdgeTrace:
    """A step of the edge's half from the lowest cut, 1."""

    forward: Pass
    backward: Pass

    def peak(self, cut: int) -> int:
        """Bytes alive at most in a step of a device that is cut at `cut`, without the adapters' own gradients."""
        own = [block for block in self.forward.peak if block >= cut]
        highest = max(part.peak[block] for part in (self.forward, self.backward) for block in own)
        return highest - (self.forward.left[cut - 1] - self.forward.left[0])

    def flops(self, cut: int) -> int:
        return sum(count for part in (self.forward, self.backward) for block, count in part.flops.items() if block >= cut)


def trace_device(
    half: DeviceHalf,
    slots: AdapterSlots,
    compute: Compute,
    batch: int,
    length: int,
    micro_batch: int = 0,
    checkpointing: bool = False,
) -> DeviceTrace:
    """A step on `batch` padded texts of `length` tokens. The half may have weights or none; its blocks are changed by it.

    Of many micro-batches two are run, which tell of the others.
    """
    in_parts = 0 < micro_batch < batch
    traced = min(batch, 2 * micro_batch) if in_parts else batch
    hidden, mask = _inputs(half, compute, traced, length)
    forward, backward = Pass(), Pass()
    _be_trained(slots)
    half.train()
    for module in (half, *half.own_blocks.values()):
        as_on_cpu(module)
    if checkpointing:
        recompute_blocks(half)
    with Meter() as meter:
        recorder = _Recorder(meter, half.own_blocks)
        recorder.begin(forward)
        activation = forward_in_micro_batches(half, mask, mask, micro_batch) if in_parts else half(mask, mask)
        recorder.begin(backward)
        held = meter.live
        backward_from(activation, hidden)
        recorder.end()
    if traced < batch:
        more = (batch - traced) * hidden[0].nbytes
        held += more
        forward.grow(more, batch / traced)
        forward.peak[_AFTER] += more  # beside its parts there is the whole activation
        backward.grow(more, batch / traced)
    return DeviceTrace(max(half.own_blocks) + 1, held, in_parts, in_parts or checkpointing, forward, backward)


def trace_edge(half: EdgeHalf, slots: AdapterSlots, compute: Compute, task: Task, batch: int, length: int) -> EdgeTrace:
    """A step of a half whose lowest cut is 1; otherwise as `trace_device`."""
    hidden, mask = _inputs(half, compute, batch, length)
    labels = mask if task == "causal-lm" else mask[:, 0]
    forward, backward = Pass(), Pass()
    _be_trained(slots)
    half.train()
    as_on_cpu(half)
    with Meter() as meter:
        recorder = _Recorder(meter, half.own_blocks)
        recorder.begin(forward)
        output = half(hidden.requires_grad_(), mask, labels, 1)
        recorder.begin(backward)
        output.loss.backward()
        recorder.end()
    return EdgeTrace(forward, backward)


def _inputs(half: DeviceHalf | EdgeHalf, compute: Compute, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """A hidden state of zeros (B, T, H), and a mask (B, T) with padding, which serves as ids too."""
    place = next(half.parameters()).device
    mask = torch.ones(batch, length, dtype=torch.int64, device=place)
    mask[:, -1:] = 0
    return torch.zeros(batch, length, half.config.hidden_size, dtype=DTYPES[compute], device=place), mask


def _be_trained(slots: AdapterSlots) -> None:
    """As when an adapter is mounted; the gradients are there beforehand, so that they do not count as the passes' own."""
    for module, name in slots.slots.values():
        parameter = module.get_parameter(name).requires_grad_()
        parameter.grad = torch.zeros_like(parameter)


class _Recorder:
    """Notes what a meter shows whenever a pass enters a block. A block's backward pass begins with its output's gradient."""

    def __init__(self, meter: Meter, blocks: dict[int, nn.Module]) -> None:
        self._meter = meter
        self._pass: Pass | None = None
        self._block = _BEFORE
        self._flops = 0
        last = max(blocks)
        for index, block in blocks.items():
            block.register_forward_pre_hook(lambda *_, index=index: self._arrive(index))
            block.register_forward_hook(lambda _, __, output, index=index: self._leave(index, output, index == last))

    def begin(self, whole: Pass) -> None:
        """What comes now belongs to `whole`."""
        self.end()
        self._pass, self._block = whole, _BEFORE

    def end(self) -> None:
        """Note what came until now."""
        if self._pass is not None:
            self._pass.peak[self._block] = max(self._pass.peak[self._block], self._meter.peak)
            self._pass.flops[self._block] += self._meter.flops - self._flops
        self._flops = self._meter.flops
        self._meter.restart()

    def _enter(self, block: int) -> None:
        self.end()
        self._block = block

    def _arrive(self, block: int) -> None:
        if self._pass is not None:
            self._pass.left[block - 1] = self._meter.live
        self._enter(block)

    def _leave(self, block: int, output: Any, last: bool) -> None:
        hidden: Tensor = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._enter(block))  # type: ignore[no-untyped-call]
        if last and self._pass is not None:
            self._pass.left[block] = self._meter.live
            self._enter(_AFTER)
