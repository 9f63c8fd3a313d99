"""FedAvg: synchronous rounds, weights by the size of the devices' data."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from sfl.fed_server.strategies.base import Strategy, Update, shares
from sfl.v1 import federation_pb2 as pb


class FedAvg(Strategy):
    """theta <- theta + sum over k of |D_k| / |D| * delta theta_k, every `local_steps` steps of each device.

    With the deltas taken from one common theta that is the average of the devices' adapters (equations 1 and 2 of the GSFS
    paper). A round is due when every device that is present or yet to join is in the pool, or `round_timeout_s` seconds
    after its first update.
    """

    def __init__(self, local_steps: int, round_timeout_s: float, keep_progress: bool, final_upload: bool) -> None:
        self.final = final_upload
        self._round_timeout_s = round_timeout_s
        self._policy = pb.UploadPolicy(
            keep_progress=keep_progress,
            final_upload=final_upload,
            periodic=pb.Periodic(local_steps=local_steps, round_timeout_s=round_timeout_s),
        )

    def policy(self) -> pb.UploadPolicy:
        return self._policy

    def due(self, pooled: AbstractSet[str], present: AbstractSet[str], missing: int, waited_s: float) -> bool:
        return (not missing and present <= pooled) or waited_s >= self._round_timeout_s

    def weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        return shares({update.device: update.examples for update in updates})
