"""FedBuff (Nguyen et al. 2022): asynchronous, a version from every so many submissions."""

from __future__ import annotations

from collections.abc import Sequence

from sfl.fed_server.strategies.base import Standing, Strategy
from sfl.fed_server.updates import Update
from sfl.v1 import federation_pb2 as pb


class FedBuff(Strategy):
    """theta <- theta + 1 / K * sum over the K submissions in the pool of (1 + lag) ** -staleness * delta theta.

    K is `buffer`, whoever they come from; with the default staleness of 0.5 the factor is the paper's 1 / sqrt(1 + lag). A
    device uploads every `local_steps` steps, the paper's Q, never waits, and takes the newest version over after an upload alone,
    so a version that comes in between finds its update stale and loses nothing. Until there is one it trains on from where it
    is, so several submissions of a device are successive progress; together they lag behind as the oldest does.
    """

    def _rule(self, size: float) -> pb.UploadPolicy:
        steps = self.settings.local_steps
        every = pb.Triggered(min_steps=steps, max_steps=steps)  # so no trigger has a say
        return pb.UploadPolicy(triggered=every, adopt_after_upload=True)

    def least_updates(self, devices: int) -> int:
        return min(self.settings.buffer, devices)

    def due(self, standing: Standing) -> bool:
        return sum(standing.pooled.values()) >= self.settings.buffer

    def _weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        submissions = sum(update.pooled for update in updates)
        return {update.device: 1 / submissions for update in updates}
