"""FedBuff (Nguyen et al. 2022): asynchronous, a version from every so many submissions."""

from __future__ import annotations

from collections.abc import Sequence

from sfl.fed_server.strategies.base import Standing, Strategy
from sfl.fed_server.updates import Update
from sfl.v1 import federation_pb2 as pb

_NEVER = 1e30  # deviations above the mean that no gradient norm reaches


class FedBuff(Strategy):
    """theta <- theta + 1 / K * sum over the K submissions in the pool of (1 + lag) ** -staleness * delta theta.

    K is `buffer`, whoever they come from; with the default staleness of 0.5 the factor is the paper's 1 / sqrt(1 + lag). A
    device uploads every `local_steps` steps, never waits, and takes the newest version over before its next step. Until there
    is one it trains on from where it is, so several submissions of a device are successive progress; together they lag
    behind as the oldest does.
    """

    def _rule(self, size: float) -> pb.UploadPolicy:
        steps = self.settings.local_steps
        always = pb.Triggered(alpha=self.settings.alpha, beta=_NEVER, min_steps=steps, max_steps=steps)
        always.metric = "loss"
        return pb.UploadPolicy(triggered=always)

    def due(self, standing: Standing) -> bool:
        return sum(standing.pooled.values()) >= self.settings.buffer

    def _weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        submissions = sum(update.pooled for update in updates)
        return {update.device: 1 / submissions for update in updates}
