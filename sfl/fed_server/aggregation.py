"""From the updates in the pool to the next version: all stages in their order, each told apart in what comes out.

 1. privacy: updates of devices whose budget is spent are refused, the others clipped
 2. the strategy's weights, staleness included
 3. robust rule: suspicious updates are refused or made smaller, or all become one
 4. merge of the LoRA factors
 5. privacy: noise. Before the next stage, as what is computed from a noisy sum is as private as the sum
 6. the strategy's server optimiser

Each is a class of its own that may be left out; with none of them it is the weighted sum of the updates. Updates are read one
at a time, so memory does not grow with their number, except for rules that say so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from sfl.adapters.state import AdapterState, trained_part
from sfl.errors import AdapterError, SettingsError, UpdateError
from sfl.fed_server.merges import make_merge
from sfl.fed_server.privacy import Privacy
from sfl.fed_server.robust import Combining, Screening, make_robust, required
from sfl.fed_server.strategies import Moments, make_strategy
from sfl.fed_server.updates import Update, by_device
from sfl.settings import FedSettings
from sfl.v1 import federation_pb2 as pb


@dataclass(frozen=True)
class ServerState:
    """What an aggregation leaves for the next one, beside the adapter; kept with the version."""

    moments: Moments = field(default_factory=dict)  # of the server optimiser
    spent: Mapping[str, float] = field(default_factory=dict)  # of each device's privacy budget


@dataclass(frozen=True)
class Aggregated:
    """What the pool has become. Nothing of it is kept before it is published: see `Aggregation.keep`."""

    state: AdapterState
    server_state: ServerState
    weights: dict[str, float] = field(default_factory=dict)  # of each device whose update counted
    rejected: dict[str, str] = field(default_factory=dict)  # the reason, by device
    notes: dict[str, Any] = field(default_factory=dict)  # for the metrics: what the stages have to say


class Aggregation:
    """The stages that the settings name, and the server state. Raises `SettingsError` when these cannot work together, or
    the expected devices are too few for the robust rule."""

    def __init__(self, settings: FedSettings, server_state: ServerState | None = None) -> None:
        self.server_state = server_state or ServerState()
        self.strategy = make_strategy(settings.strategy)
        self.merge = make_merge(settings.merge)
        self._robust = make_robust(settings.robust)
        self._privacy = Privacy(settings.privacy, self.server_state.spent)
        self._clips = settings.privacy.on
        rule, attackers = settings.robust.rule, settings.robust.attackers
        self.least = required(rule, attackers) if self._robust is not None else 1  # updates in a pool
        self.why = f"robust rule {rule} needs {self.least} updates to bear {attackers} attackers"
        if self.least > settings.devices:
            raise SettingsError(
                f"robust.rule {rule} with robust.attackers {attackers} needs the updates of {self.least} devices, and"
                f" `devices` is {settings.devices}: lower robust.attackers or choose another rule"
            )

    def policy(self, size: float = 1.0, logit_offsets: Sequence[float] = ()) -> pb.UploadPolicy:
        """When a device uploads and how it trains, for this strategy and merge; `size` as for `Strategy.policy`, and the offsets
        as for `logit_offsets`."""
        policy = self.strategy.policy(size)
        policy.logit_offsets.extend(logit_offsets)
        policy.frozen_parts.extend(self.merge.frozen_parts)
        policy.fresh_optimizer = self.merge.fresh_optimizer
        return policy

    def view(self, state: AdapterState, version: int, rank: int) -> AdapterState:
        """`state`, which is that `version`, as a device of this rank gets it. Raises `AdapterError` for a rank that cannot be."""
        return self.merge.view(state, rank, f"version {version}")

    def trained(self, state: AdapterState, rank: int) -> AdapterState:
        """The tensors that an update of this rank has, of the right shapes; their values mean nothing."""
        return {key: state[key][trained_part(key, rank)] for key in self.merge.trained(state)}

    def aggregate(self, state: AdapterState, updates: Sequence[Update], population: int) -> Aggregated:
        """The next version from `state`, the newest. The same, to the bit, in whatever order the updates are given.

        `population` are the training examples of all devices that take part. What cannot be used is in `rejected`; when that
        is all, the state stays as it is. Raises `AdapterError` when the result would not be finite, `OSError` when updates cannot
        be read now; nothing has happened then.
        """
        usable, unusable = list(updates), dict[str, str]()
        with threadpool_limits(1, "blas"):  # matrices are small: a second thread only waits, on busy cores for many times as long
            while True:
                try:
                    done = self._aggregated(state, usable, population)
                except UpdateError as error:
                    if error.device not in {update.device for update in usable}:  # what a robust rule made of all
                        raise
                    unusable[error.device] = str(error)
                    usable = [update for update in usable if update.device != error.device]
                else:
                    return dataclasses.replace(done, rejected=done.rejected | unusable)

    def _aggregated(self, state: AdapterState, updates: Sequence[Update], population: int) -> Aggregated:
        counted = by_device(updates)
        notes: dict[str, Any] = {}
        admitted = self._privacy.admit(counted)
        counted, rejected = admitted.updates, admitted.refused
        if self._clips:
            notes["clipped"] = admitted.clipped
        if len(counted) < self.least:
            few = f"{self.why}, and the pool has {len(counted)}"
            return Aggregated(state, self.server_state, rejected=rejected | {update.device: few for update in counted})
        weights = self.strategy.weights(counted, population)
        merging, shares = self.strategy.prepare(counted, weights), weights
        if isinstance(self._robust, Screening):
            screened = self._robust.screen(merging, weights)
            merging, shares, weights = screened.updates, screened.weights, screened.weights
            rejected |= screened.rejected
            notes["made_smaller"] = screened.changed
        elif isinstance(self._robust, Combining):
            one = self._combined(self._robust, merging, weights, state)
            merging, shares = [one], {one.device: sum(weights.values())}
        merged = self.merge.merge(state, merging, shares)
        merged = self._privacy.with_noise(merged, self.merge.trained(merged), weights)
        result, moments = self.strategy.apply(state, merged, self.server_state.moments)
        _require_finite(result)
        return Aggregated(result, ServerState(moments, self._privacy.after(weights)), weights, rejected, notes)

    def keep(self, done: Aggregated) -> None:
        """Go on from what `done`, now published, leaves."""
        self.server_state = done.server_state
        self._privacy.spent = dict(done.server_state.spent)

    def epsilons(self) -> dict[str, float]:
        """What each device that took part has spent of its privacy, if there is any."""
        return {device: round(epsilon, 4) for device, epsilon in self._privacy.epsilons().items()}

    def _combined(self, rule: Combining, updates: Sequence[Update], weights: Mapping[str, float], state: AdapterState) -> Update:
        """The one update that `rule` makes of all."""
        delta = rule.combine(updates, weights)
        largest = max(updates, key=lambda update: update.rank)
        name, base = f"{rule.name} of {len(updates)}", lambda: self.merge.view(state, largest.rank)
        return dataclasses.replace(largest.holding(delta), device=name, base=base)


def _require_finite(state: AdapterState) -> None:
    for key, value in state.items():
        if not np.isfinite(value).all():
            raise AdapterError(f"adapter tensor {key} would hold values that are not finite: some update is far too large")
