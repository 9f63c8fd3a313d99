"""The seam of the robust rules: how many attackers each bears, and what it makes of a pool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from sfl.adapters.state import AdapterState
from sfl.errors import SettingsError
from sfl.fed_server.updates import Update

# Least number n of updates for f attackers, as a f + b: the conditions of the papers that the rules' classes name.
_REQUIRED = {
    "krum": (2, 3),
    "multi-krum": (2, 3),
    "bulyan": (4, 3),
    "median": (2, 1),
    "trimmed-mean": (2, 1),
    "norm-clip": (2, 1),  # of as many attackers as honest devices the sum is theirs at any norm
}


@dataclass(frozen=True)
class Screened:
    """What a rule leaves of a pool. The weights have the same sum as before."""

    updates: list[Update]
    weights: dict[str, float]
    rejected: dict[str, str] = field(default_factory=dict)  # the reason, by device
    changed: dict[str, float] = field(default_factory=dict)  # the factor by which an update was made smaller, by device


class Robust(ABC):
    """A rule that bears `attackers` devices whose updates may be anything, among at least `required` ones: with fewer it is not
    to be asked. What devices say of themselves, such as their numbers of examples and so their weights, has no say in whom or
    what it believes."""

    name: ClassVar[str]

    def __init__(self, attackers: int) -> None:
        self.attackers = attackers


class Screening(Robust):
    """A rule that leaves updates out or makes them smaller."""

    @abstractmethod
    def screen(self, updates: Sequence[Update], weights: Mapping[str, float]) -> Screened:
        """The updates to go on with, sorted by device, and their weights."""


class Combining(Robust):
    """A rule that makes one update of all, value by value; it counts with the weight of all."""

    @abstractmethod
    def combine(self, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        """The one delta, float32, at the largest rank among the updates. Smaller ranks are padded with zeros.

        `weights` are not looked at: every update counts the same.
        """


def required(rule: str, attackers: int) -> int:
    """The least number of updates with which a rule bears so many attackers. Raises `SettingsError` for an unknown rule."""
    if rule not in _REQUIRED:
        raise SettingsError(f"there is no robust rule '{rule}': choose one of {', '.join(_REQUIRED)}")
    factor, more = _REQUIRED[rule]
    return factor * attackers + more


def selected(
    updates: Sequence[Update], weights: Mapping[str, float], chosen: Sequence[str], rejected: Mapping[str, str]
) -> Screened:
    """The updates of the devices `chosen`, which carry the whole weight in proportion to their own."""
    whole = sum(weights[update.device] for update in updates)
    own = sum(weights[device] for device in chosen)
    carried = {device: whole * weights[device] / own if own > 0 else whole / len(chosen) for device in sorted(chosen)}
    return Screened([update for update in updates if update.device in carried], carried, dict(rejected))
