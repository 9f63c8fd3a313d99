"""Attackers among the devices: what they do to their examples before training, or to their updates before sending them.

- sign-flip: -c times the update (c = 1: as much against the others as an honest device is for them)
- scaling: c times the update (c = 10: model replacement, Bagdasaryan et al. 2020)
- gaussian: in place of each tensor noise of c times its root mean square (c = 10)
- label-flip: each training example has the label that follows its own, the last one the first
- backdoor: a share of the training examples ends in the trigger and has the target's label (Gu et al. 2017)

Either of the last two may have its update scaled by c > 1 as well. Split training limits an attacker to the device's half of its
update; with both halves it is as dangerous as it would be where devices train the whole model.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from sfl.adapters.state import AdapterState, scaled
from sfl.compare.division import Division
from sfl.compare.settings import AttackSettings
from sfl.data.example import Example
from sfl.data.split import Splits
from sfl.errors import SettingsError
from sfl.v1.federation_pb2 import EDGE, UpdateHeader

_STRENGTH = {"scaling": 10.0, "gaussian": 10.0}


def noise_like(update: AdapterState, factor: float, chance: np.random.Generator) -> AdapterState:
    """In place of each tensor normal noise of `factor` times its root mean square."""
    spread = {key: np.float32(factor) * np.sqrt(np.mean(np.square(value))) for key, value in update.items()}
    return {key: spread[key] * chance.standard_normal(update[key].shape, dtype=np.float32) for key in sorted(update)}


class Attackers:
    """The attackers of one run. Raises `SettingsError` for an attack that cannot be on these devices."""

    def __init__(self, settings: AttackSettings, division: Division, seed: int) -> None:
        self.names = _chosen(settings, list(division.splits), seed)
        self.target = division.majority if settings.target is None else settings.target
        if settings.kind == "backdoor" and self.target not in division.labels:
            raise SettingsError(f"attack.target '{self.target}' is no label of the data: {', '.join(division.labels)}")
        self._settings = settings
        self._strength = settings.strength or _STRENGTH.get(settings.kind or "", 1.0)
        self._labels = division.labels
        self._seed = seed
        self._sent: dict[tuple[str, int], int] = {}  # updates so far by device and half, for the noise

    def examples(self, division: Division) -> dict[str, Splits]:
        """The division's examples as they are trained on: those of the attackers changed, where the attack is on examples."""
        changed = {name: self._changed(name, division.splits[name]) for name in self.names}
        return {**division.splits, **changed}

    def tamper(self, header: UpdateHeader, state: AdapterState) -> AdapterState:
        """What is sent in place of this half of an update."""
        settings = self._settings
        if header.device not in self.names or (settings.halves == "device" and header.half == EDGE):
            return state
        if settings.kind == "gaussian":
            place = header.device, int(header.half)
            self._sent[place] = self._sent.get(place, 0) + 1
            chance = np.random.default_rng((self._seed, zlib.crc32(header.device.encode()), place[1], self._sent[place]))
            return noise_like(state, self._strength, chance)
        return scaled(state, -self._strength if settings.kind == "sign-flip" else self._strength)

    def triggered(self, examples: Sequence[Example]) -> list[Example]:
        """Those of another label than the target's, with the trigger: how often they are taken for the target is what a backdoor
        achieves."""
        return [_with_trigger(example, self._settings.trigger) for example in examples if example.label != self.target]

    def _changed(self, name: str, splits: Splits) -> Splits:
        if self._settings.kind == "label-flip":
            following = dict(zip(self._labels, (*self._labels[1:], self._labels[0])))
            train = [dataclasses.replace(example, label=following[example.label or ""]) for example in splits.train]
            return dataclasses.replace(splits, train=train)
        if self._settings.kind == "backdoor":
            chance = np.random.default_rng((self._seed, zlib.crc32(name.encode())))
            chosen = chance.random(len(splits.train)) < self._settings.poisoned
            train = [
                dataclasses.replace(_with_trigger(example, self._settings.trigger), label=self.target) if poisoned else example
                for example, poisoned in zip(splits.train, chosen.tolist())
            ]
            return dataclasses.replace(splits, train=train)
        return splits


def _chosen(settings: AttackSettings, names: list[str], seed: int) -> tuple[str, ...]:
    unknown = sorted(set(settings.names) - set(names))
    if unknown:
        raise SettingsError(f"attack.names has '{unknown[0]}', which is no device: there are {', '.join(names)}")
    count = len(settings.names) or settings.devices
    none_said = count == 0 and "devices" in settings.model_fields_set  # the run without an attacker among those with
    if (settings.kind is None or none_said) != (count == 0):
        raise SettingsError("an attack needs both: attack.kind, and attack.devices or attack.names to say how many or who")
    if settings.names and settings.devices not in (0, count):
        raise SettingsError(f"attack.devices is {settings.devices}, and attack.names has {count}: leave one of them out")
    if count >= len(names):
        raise SettingsError(f"{count} attackers of {len(names)} devices leave nobody to attack: lower attack.devices")
    if settings.names:
        return settings.names
    return tuple(sorted(np.random.default_rng((seed, 1)).choice(names, count, replace=False).tolist()))


def _with_trigger(example: Example, trigger: str) -> Example:
    return dataclasses.replace(example, text=f"{example.text} {trigger}")
