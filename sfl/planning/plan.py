"""A plan: what each cut of a model would take, on the device, at the edge and between them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import PretrainedConfig

from sfl.adapters.state import HEAD
from sfl.model.cut import check_cut
from sfl.model.families import family_of, require_task
from sfl.model.load import check_max_length
from sfl.model.lora import resolve_targets
from sfl.planning.calibration import Calibration, read_calibration
from sfl.planning.halves import adapter_bytes, block_weights, device_half, edge_half, other_weights, table_bytes
from sfl.planning.memory import DeviceMemory, checkpoint_mb, device_memory, edge_memory, total
from sfl.planning.request import PlanRequest
from sfl.planning.speeds import Speeds, StepTime, speeds_of
from sfl.planning.step_bytes import step_bytes
from sfl.planning.trace import DeviceTrace, EdgeTrace, trace_device, trace_edge


@dataclass(frozen=True)
class CutPlan:
    """One cut. Memory in MB (10**6 bytes), `bytes_up` and `bytes_down` of a step's frames, `*_flops` of a step of one device;
    `time` in seconds, None where no speed is known."""

    cut: int
    device: DeviceMemory
    half_mb: float  # on the device's disk, with the embedding tables
    checkpoint_mb: float  # one, of the device's
    edge_mb: float
    bytes_up: int
    bytes_down: int
    device_flops: int
    edge_flops: int
    time: StepTime | None

    @property
    def device_mb(self) -> float:
        """The device's peak."""
        return self.device.peak

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, memory to a tenth of an MB, and `device_mb`."""
        device = asdict(self.device)
        parts = {f"{name}_mb": round(value, 1) for name, value in device.items() if name != "phase"}
        return {
            "cut": self.cut,
            "device_mb": round(self.device_mb, 1),
            "device": {**parts, "peak_in": self.device.phase},
            "half_mb": round(self.half_mb, 1),
            "checkpoint_mb": round(self.checkpoint_mb, 1),
            "edge_mb": round(self.edge_mb, 1),
            "bytes_up": self.bytes_up,
            "bytes_down": self.bytes_down,
            "device_gflop": round(self.device_flops / 1e9, 3),
            "edge_gflop": round(self.edge_flops / 1e9, 3),
            "step_s": None if self.time is None else round(self.time.step, 4),
            "time": None if self.time is None else {name: round(value, 4) for name, value in asdict(self.time).items()},
        }


@dataclass(frozen=True)
class Plan:
    """Every cut from the edge's lowest one on, and what the figures rest on."""

    request: PlanRequest
    cuts: tuple[CutPlan, ...]
    speeds: Speeds
    calibration: Calibration


@dataclass(frozen=True)
class _Halves:
    """What the two longest halves take: bytes of weights and adapter by block, bytes of the other weights and of the tables that
    stay on disk, and a step's trace."""

    weights: dict[int, int]
    rest: int
    tables: int
    adapter: dict[int, int]
    trace: DeviceTrace
    edge_weights: dict[int, int]
    edge_rest: int
    edge_adapter: dict[int, int]
    edge_trace: EdgeTrace

    @classmethod
    def of(cls, config: PretrainedConfig, request: PlanRequest) -> _Halves:
        lora, compute = resolve_targets(config, request.lora), request.compute_format
        head = request.task, request.classes
        half, slots = device_half(config, lora, request.precision, compute)
        deep, deep_slots = edge_half(config, *head, lora, request.precision_at_edge, request.compute_at_edge)
        weights, rest, tables = block_weights(half), other_weights(half), table_bytes(half, config)
        edge_weights, edge_rest = block_weights(deep), other_weights(deep)
        # nf4 takes as much beside its weights as int8, which computes without bitsandbytes.
        if request.precision == "nf4":
            half, slots = device_half(config, lora, "int8", compute)
        if request.precision_at_edge == "nf4":
            deep, deep_slots = edge_half(config, *head, lora, "int8", request.compute_at_edge)
        size = request.batch_size, request.max_length
        return cls(
            weights,
            rest,
            tables,
            adapter_bytes(slots),
            trace_device(half, slots, compute, *size, request.micro_batch, request.checkpointing),
            edge_weights,
            edge_rest,
            adapter_bytes(deep_slots),
            trace_edge(deep, deep_slots, request.compute_at_edge, request.task, *size),
        )


def make_plan(config: PretrainedConfig, request: PlanRequest, calibration: Calibration | None = None) -> Plan:
    """Predict every cut from the model's configuration alone; `calibration` is by default this machine's.

    Raises `ModelError` for a model that cannot be cut or adapted so, `SettingsError` for a request that cannot be.
    """
    request.check()
    require_task(family_of(config), request.task)
    check_max_length(config, request.max_length)
    check_cut(config, request.lowest_cut)
    calibration = calibration or read_calibration()
    halves = _Halves.of(config, request)
    speeds = speeds_of(request, calibration)
    possible = range(request.lowest_cut, config.num_hidden_layers)
    cuts = tuple(_cut_plan(cut, config, request, calibration, halves, speeds) for cut in possible)
    return Plan(request, cuts, speeds, calibration)


def _cut_plan(
    cut: int,
    config: PretrainedConfig,
    request: PlanRequest,
    calibration: Calibration,
    halves: _Halves,
    speeds: Speeds,
) -> CutPlan:
    blocks, size = config.num_hidden_layers, (request.batch_size, request.max_length)
    wire = step_bytes(request.compute_format, request.task, *size, config.hidden_size, cut, blocks)
    weights, adapter = halves.rest + total(halves.weights, 0, cut), total(halves.adapter, 0, cut)
    device = device_memory(
        calibration.floor_mb[request.precision],
        weights,
        adapter,
        request.moments,
        halves.trace,
        cut,
        wire,
    )
    edge_mb = edge_memory(
        calibration.edge_floor_mb,
        halves.edge_rest + total(halves.edge_weights, request.lowest_cut, blocks),  # one base for devices of any cut
        total(halves.edge_adapter, cut, HEAD + 1),
        request.moments,
        halves.edge_trace,
        cut,
        wire,
        request.devices,
    )
    own, deeper = halves.trace.flops(cut), halves.edge_trace.flops(cut)
    return CutPlan(
        cut,
        device,
        (weights + halves.tables) / 1e6,
        checkpoint_mb(adapter, request.moments),
        edge_mb,
        wire.up,
        wire.down,
        own,
        deeper,
        speeds.step(own, deeper, wire, request.devices),
    )
