"""What a plan is asked for: everything about the training but the model and the cut. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sfl.adapters.layout import LoraSpec
from sfl.data.settings import Task
from sfl.errors import SettingsError
from sfl.settings import Compute, DeviceSettings, Precision, compute_format


@dataclass(frozen=True)
class PlanRequest:
    """How a device trains, and what lies between it and its edge.

    `batch_size` texts of `max_length` tokens in a step, `micro_batch` of them at a time (0: all); `precision` and `compute`
    are those of the device, and of the edge unless `edge_precision` says otherwise. `lowest_cut` is the edge's, `devices`
    how many it serves, `classes` how many labels a classifier has. Speeds: 10**9 floating-point operations a second of
    either side, where known; the link's bandwidth in Mbit/s each way and its round trip in ms.
    """

    task: Task = "classification"
    batch_size: int = 8
    max_length: int = 64
    micro_batch: int = 0
    checkpointing: bool = False
    precision: Precision = "fp32"
    compute: Compute | None = None
    lora: LoraSpec = field(default_factory=LoraSpec)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    devices: int = 1
    edge_precision: Precision | None = None
    lowest_cut: int = 1
    classes: int = 2
    device_gflops: float | None = None
    edge_gflops: float | None = None
    bandwidth_mbit: float | None = None
    rtt_ms: float | None = None

    @classmethod
    def of(cls, settings: DeviceSettings, lowest_cut: int = 1) -> PlanRequest:
        """What a device with these settings would ask, of an edge with this lowest cut."""
        return cls(
            task=settings.task,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            micro_batch=settings.micro_batch,
            checkpointing=settings.checkpointing,
            precision=settings.precision,
            compute=settings.compute,
            lora=settings.lora.spec(),
            optimizer=settings.optimizer.name,
            lowest_cut=lowest_cut,
        )

    @property
    def compute_format(self) -> Compute:
        """The number format of activations in force, on the device and between it and its edge."""
        return compute_format(self.precision, self.compute)

    @property
    def precision_at_edge(self) -> Precision:
        """The precision of the edge's base in force."""
        return self.edge_precision or self.precision

    @property
    def compute_at_edge(self) -> Compute:
        """The number format in which the edge computes."""
        if self.edge_precision is None:
            return self.compute_format
        return compute_format(self.edge_precision)

    @property
    def moments(self) -> int:
        """How many numbers the optimiser keeps for each that is trained."""
        return 2 if self.optimizer == "adamw" else 0

    def check(self) -> None:
        """Raise `SettingsError` for a number that cannot be."""
        for name in ("batch_size", "max_length", "devices", "lowest_cut"):
            if getattr(self, name) < 1:
                raise SettingsError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.micro_batch < 0:
            raise SettingsError(f"micro_batch is {self.micro_batch}: give 1 or more, or 0 for the whole batch")
        for name in ("device_gflops", "edge_gflops", "bandwidth_mbit", "rtt_ms"):
            value = getattr(self, name)
            if value is not None and not (value > 0 or (name == "rtt_ms" and value == 0)):
                raise SettingsError(f"{name} is {value}: give a number above 0, or leave it out where it is not known")
