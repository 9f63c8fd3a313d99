"""Aggregation strategies by name."""

from __future__ import annotations

from dataclasses import dataclass

from sfl.errors import SettingsError
from sfl.fed_server.strategies.base import Strategy, Update, weighted_sum
from sfl.fed_server.strategies.fedavg import FedAvg
from sfl.fed_server.strategies.gsfs import Gsfs, Weights
from sfl.settings import StrategySettings
from sfl.v1 import federation_pb2 as pb

__all__ = ["Strategy", "Update", "make_strategy", "weighted_sum"]


@dataclass(frozen=True)
class _Defaults:
    """What a named strategy takes where the settings say nothing."""

    keep_progress: bool
    final_upload: bool
    weights: Weights = "examples"
    beta: float = 2.0
    min_steps: int = 10
    threshold: float = 0.1
    threshold_growth: float = 1.5
    threshold_decay: float = 0.8


_DEFAULTS = {
    "gsfs": _Defaults(keep_progress=True, final_upload=True, weights="share"),
    "gsfs-printed": _Defaults(
        keep_progress=False,
        final_upload=False,
        weights="frequency",
        min_steps=1,
        threshold=0.3,
        threshold_growth=1.0,
        threshold_decay=1.0,
    ),
    "fedavg": _Defaults(keep_progress=False, final_upload=True),
}


def make_strategy(settings: StrategySettings) -> Strategy:
    """The strategy that `settings` names, its own defaults in place of what they leave open.

    Raises `SettingsError` for weights that the strategy does not have.
    """
    given = settings.model_dump()
    default = _DEFAULTS[settings.name]
    chosen = _Defaults(**{name: value if given[name] is None else given[name] for name, value in vars(default).items()})
    if settings.name == "fedavg":
        if chosen.weights != "examples":
            raise SettingsError(f"fedavg weighs by examples: strategy.weights '{chosen.weights}' needs gsfs")
        return FedAvg(settings.local_steps, settings.round_timeout_s, chosen.keep_progress, chosen.final_upload)
    triggered = pb.Triggered(
        alpha=settings.alpha,
        beta=chosen.beta,
        min_steps=chosen.min_steps,
        validate_every=settings.validate_every,
        threshold=chosen.threshold,
        threshold_growth=chosen.threshold_growth,
        threshold_decay=chosen.threshold_decay,
        metric=settings.metric,
    )
    return Gsfs(settings.quorum, chosen.weights, triggered, chosen.keep_progress, chosen.final_upload)
