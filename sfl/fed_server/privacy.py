"""Differential privacy of the devices' updates: DP-FedAvg (McMahan et al. 2018) at the federation server.

At an aggregation, in this order:

    admitted = privacy.admit(updates)          # clipped; devices whose budget is spent are refused, with the reason
    ... weights of the strategy, robust rule, merge ...
    merged = privacy.with_noise(merged, merge.trained(merged), weights)
    ... the strategy's server optimiser ...    # what is computed from a noisy sum is as private as the sum
    privacy.spent = privacy.after(weights)     # once the version is published

The mechanism, with C the clip and z the noise multiplier:

    sum over k of w_k delta_k min(1, C / ||delta_k||) + N(0, (z C max w)^2)

The noise goes by what one update can add, however many are in the sum: the fewer versions all devices' updates become, the
less noise in all, at the same epsilon.

What it protects: whoever sees the versions, all of them, learns little of what one device's whole update was, and so of its
data: (epsilon, delta)-differential privacy of devices, where neighbouring federations are those in which one device's
updates are zero. What it does not: the federation server sees every update and is trusted to clip and add noise; the edge
sees activations and labels, about which nothing is promised here; that a device takes part, when it submits and its number of
examples are taken as public, although a trigger looks at data, so there is no amplification by sampling either. Noise comes from
NumPy's generator in floating point, which is good against readers of adapters, not against whoever can predict the generator.

Accounting: a version is, for device k, a Gaussian mechanism of noise multiplier sigma_k = z max w / w_k >= z. Such
mechanisms compose to one with 1 / sigma^2 = sum 1 / sigma_k^2, also where the next one depends on the outcomes before
(Smith and Thakurta 2022; for each device by itself Koskela et al. 2023), and epsilon at delta is that of the analytic Gaussian
mechanism (Balle and Wang 2018), by Google's dp-accounting. A version without noise tells all of the updates in it: what their
devices have spent is infinite from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.errors import AdapterError, SettingsError
from sfl.fed_server.updates import Update, by_device
from sfl.federation_settings import PrivacySettings
from sfl.telemetry import log


@dataclass(frozen=True)
class Admitted:
    """The updates that count, clipped and sorted by device."""

    updates: list[Update]
    refused: dict[str, str]  # the reason, by device
    clipped: dict[str, float]  # the factor by which an update was made smaller, by device


class Privacy:
    """Clips, adds noise and keeps each device's account. Raises `SettingsError` where dp-accounting is needed and missing.

    Where both are off, updates stay as they are and no account is kept. `spent` is sum 1 / sigma_k^2 by device, infinite once
    a version without noise holds an update of it; give it back what was kept of an earlier run.
    """

    def __init__(self, settings: PrivacySettings, spent: Mapping[str, float] | None = None) -> None:
        self.spent = dict(spent or {})
        self._settings = settings
        self._generator = np.random.default_rng(settings.seed)
        self._curve = _gaussian_mechanism() if settings.noise else None
        self._most = self._affordable()
        if settings.seed is not None and settings.noise:
            log.warning("privacy.seed is set: whoever knows it can take the noise away; leave it out but for tests")

    def _affordable(self) -> float:
        """The greatest sum 1 / sigma_k^2 that a budget allows."""
        epsilon, noise = self._settings.epsilon, self._settings.noise
        if self._curve is None or not epsilon:
            return math.inf
        least = self._curve.sigma(epsilon, self._settings.delta)
        if noise < least:
            raise SettingsError(
                f"one version with privacy.noise {noise:g} takes more than privacy.epsilon {epsilon:g} at privacy.delta"
                f" {self._settings.delta:g}: raise privacy.epsilon, or privacy.noise to {least:.4g} times the root of the number"
                " of versions that each device is to take part in"
            )
        return float(least**-2)

    def admit(self, updates: Sequence[Update]) -> Admitted:
        """Clip to norm C the updates of devices that can afford one more version at full weight; refuse the others."""
        refused, clipped, admitted = {}, {}, []
        for update in by_device(updates):
            if self.exhausted(update.device):
                refused[update.device] = (
                    f"its privacy budget is spent: epsilon is {self.epsilon(update.device):.4g} and one more version could take"
                    f" it past privacy.epsilon {self._settings.epsilon:g}"
                )
                continue
            size = update.norm() if self._settings.on else 0.0
            if size > self._settings.clip:
                clipped[update.device] = self._settings.clip / size
                update = update.scaled(clipped[update.device])
            admitted.append(update)
        return Admitted(admitted, refused, clipped)

    def with_noise(self, merged: AdapterState, trained: Collection[AdapterKey], weights: Mapping[str, float]) -> AdapterState:
        """`merged` with N(0, (z C max w)^2) added to every value of the tensors `trained`, in their sorted order."""
        deviation = self._settings.noise * self._settings.clip * max(weights.values(), default=0.0)
        if not math.isfinite(deviation):
            raise AdapterError(f"noise of standard deviation {deviation} cannot be added")
        result = dict(merged)
        if deviation > 0:
            for key in sorted(trained):
                noise = self._generator.standard_normal(merged[key].shape, dtype=np.float32)
                result[key] = merged[key] + np.float32(deviation) * noise
        return result

    def after(self, weights: Mapping[str, float]) -> dict[str, float]:
        """The accounts once a version with these weights is published: 1 / sigma_k^2 = (w_k / (z max w))^2 more each.

        Empty where privacy is off.
        """
        if not self._settings.on:
            return {}
        deviation = self._settings.noise * max(weights.values(), default=0.0)
        spent = dict(self.spent)
        for device, weight in sorted(weights.items()):
            if weight > 0:
                spent[device] = spent.get(device, 0.0) + ((weight / deviation) ** 2 if deviation else math.inf)
        return spent

    def exhausted(self, device: str) -> bool:
        """Whether one more version could take a device past its budget."""
        return self._curve is not None and self.spent.get(device, 0.0) + self._settings.noise**-2 > self._most * (1 + 1e-9)

    def epsilon(self, device: str) -> float:
        """What a device has spent so far, at the delta that is set; infinite without noise, now or in an earlier version."""
        spent = self.spent.get(device, 0.0)
        if self._curve is None or math.isinf(spent):
            return math.inf
        return self._curve.epsilon(spent**-0.5, self._settings.delta) if spent else 0.0

    def epsilons(self) -> dict[str, float]:
        """That of every device that has taken part; the run's is the largest. Empty without noise."""
        return {device: self.epsilon(device) for device in sorted(self.spent)} if self._curve is not None else {}


class _Curve(NamedTuple):
    """Of the Gaussian mechanism: epsilon of (sigma, delta), and sigma of (epsilon, delta)."""

    epsilon: Callable[[float, float], float]
    sigma: Callable[[float, float], float]


def _gaussian_mechanism() -> _Curve:
    try:
        from dp_accounting import get_epsilon_gaussian, get_sigma_gaussian  # takes seconds and 80 MB, so only where needed
    except ImportError as error:
        raise SettingsError("privacy.noise needs the library dp-accounting for its account: pip install 'sfl[dp]'") from error
    return _Curve(get_epsilon_gaussian, get_sigma_gaussian)
