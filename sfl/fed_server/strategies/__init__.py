"""Aggregation strategies by name."""

from __future__ import annotations

from sfl.fed_server.strategies.base import Moments, Standing, Strategy
from sfl.fed_server.strategies.fedavg import FedAvg, FedProx
from sfl.fed_server.strategies.fedbuff import FedBuff
from sfl.fed_server.strategies.fedopt import FedAdagrad, FedAdam, FedAvgM, FedYogi
from sfl.fed_server.strategies.gsfs import Gsfs
from sfl.fed_server.strategies.splitlora import SplitLora
from sfl.federation_settings import StrategyName, StrategySettings

__all__ = ["Moments", "Standing", "Strategy", "make_strategy"]

_STRATEGIES: dict[StrategyName, type[Strategy]] = {
    "gsfs": Gsfs,
    "gsfs-printed": Gsfs,  # by its defaults
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "fedadagrad": FedAdagrad,
    "fedbuff": FedBuff,
    "splitlora": SplitLora,
}


def make_strategy(settings: StrategySettings) -> Strategy:
    """The strategy that `settings` names."""
    return _STRATEGIES[settings.name](settings)
