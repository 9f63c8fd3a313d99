"""Aggregation strategies by name."""

from __future__ import annotations

from sfl.fed_server.strategies.base import Strategy, Update, weighted_sum
from sfl.fed_server.strategies.fedavg import FedAvg
from sfl.fed_server.strategies.gsfs import Gsfs
from sfl.settings import StrategySettings
from sfl.v1 import federation_pb2 as pb

__all__ = ["Strategy", "Update", "make_strategy", "weighted_sum"]


def make_strategy(settings: StrategySettings) -> Strategy:
    """The strategy that `settings` names."""
    if settings.name == "fedavg":
        return FedAvg(settings.local_steps, settings.round_timeout_s, settings.keep_progress, settings.final_upload)
    triggered = pb.Triggered(
        alpha=settings.alpha,
        beta=settings.beta,
        min_steps=settings.min_steps,
        validate_every=settings.validate_every,
        threshold=settings.threshold,
        threshold_growth=settings.threshold_growth,
        threshold_decay=settings.threshold_decay,
        metric=settings.metric,
    )
    return Gsfs(settings.quorum, settings.weights, triggered, settings.keep_progress, settings.final_upload)
