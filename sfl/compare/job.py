"""A run to be made: a variant under a seed, as the settings of its daemons and what they have not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sfl.compare.attackers import Attackers
from sfl.compare.division import Division
from sfl.compare.settings import CompareSettings
from sfl.compare.variants import CENTRALISED, Variant, checked, merged
from sfl.errors import SettingsError
from sfl.settings import DeviceSettings, FedSettings
from sfl.simulated_time import DeviceSpeed
from sfl.simulation import Conditions

_ALONE = "central"  # the name of the device that has all examples


@dataclass(frozen=True)
class Job:
    """One run, not made yet."""

    variant: Variant
    seed: int
    fed: FedSettings
    devices: list[DeviceSettings]
    division: Division
    attackers: Attackers
    conditions: Conditions

    @property
    def steps(self) -> int:
        """Local steps of all devices together."""
        return sum(device.steps for device in self.devices)

    @property
    def target(self) -> int:
        """The class index of a backdoor's target."""
        return self.division.labels.index(self.attackers.target)

    @property
    def title(self) -> str:
        """Its name for people."""
        return f"{self.variant.name}, seed {self.seed}"


def prepare(settings: CompareSettings, model: str, variant: Variant, seed: int, division: Division) -> Job:
    """The settings of every daemon. Raises `SettingsError` for what cannot be; nothing is loaded or trained."""
    own, names = variant.settings, list(division.data)
    for what in ("cuts", "ranks"):
        if len(getattr(own, what)) > len(names):
            raise SettingsError(f"run '{variant.name}' has {len(getattr(own, what))} {what} for {len(names)} devices")
    devices = [_device(settings, model, variant, seed, division, index) for index in range(len(names))]
    if variant.centralised:
        return _centralised(settings, variant, seed, devices, division)
    fed = variant.fed_settings(len(devices), division.labels)
    attackers = Attackers(own.attack, division, seed)
    speeds = {name: _speed(variant, index) for index, name in enumerate(names)}
    tamper = attackers.tamper if attackers.names else None
    return Job(variant, seed, fed, devices, division, attackers, Conditions(speeds, attackers.examples(division), tamper))


def _device(settings: CompareSettings, model: str, variant: Variant, seed: int, division: Division, index: int) -> DeviceSettings:
    own, name = variant.settings, list(division.data)[index]
    values: dict[str, Any] = {
        "name": name,
        "data": division.data[name],
        "model": model,
        "lora": own.lora.model_dump(),
        "cut": own.cuts[index % len(own.cuts)],
        "steps": own.steps,
        "batch_size": own.batch_size,
        "max_length": settings.max_length,
        "optimizer": own.optimizer.model_dump(),
        "precision": own.precision,
        "run_on": settings.run_on,
        "seed": seed,
    }
    if own.ranks:
        values["rank"] = own.ranks[index % len(own.ranks)]
    return checked(DeviceSettings, merged(values, own.device), f"the devices of run '{variant.name}'")


def _centralised(
    settings: CompareSettings, variant: Variant, seed: int, devices: Sequence[DeviceSettings], division: Division
) -> Job:
    """All examples at one place, as many steps of as many examples as all devices together, from the same version 0.

    It is a federation of one device, which trains exactly as unsplit PEFT does (tests/engine/test_split_equals_unsplit.py).
    It has no attackers, and its versions are only there to be looked at.
    """
    steps = sum(device.steps for device in devices)
    every = math.ceil(steps / max(settings.curve_points - 1, 1))
    strategy = {"name": "fedavg", "local_steps": every}
    fed = checked(FedSettings, {"devices": 1, "labels": division.labels, "strategy": strategy}, CENTRALISED)
    alone = devices[0].model_copy(update={"name": _ALONE, "steps": steps, "rank": None})
    nobody = Attackers(variant.settings.attack.model_copy(update={"kind": None, "devices": 0, "names": ()}), division, seed)
    there = Conditions({_ALONE: DeviceSpeed(_speed(variant, 0).step_s)}, {_ALONE: division.pooled})
    return Job(variant, seed, fed, [alone], division, nobody, there)


def _speed(variant: Variant, index: int) -> DeviceSpeed:
    own = variant.settings

    def of_device(values: Sequence[float], otherwise: float) -> float:
        return values[index % len(values)] if values else otherwise

    return DeviceSpeed(
        step_s=of_device(own.step_ms, math.nan) / 1e3,
        bytes_per_s=of_device(own.mbit_s, math.inf) * 1e6 / 8,
        round_trip_s=of_device(own.round_trip_ms, 0.0) / 1e3,
    )
