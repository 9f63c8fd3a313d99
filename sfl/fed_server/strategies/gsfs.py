"""GSFS (arXiv 2504.16032): devices upload when gradients or performance say so, a quorum of them makes a version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from sfl.fed_server.strategies.base import Strategy, Update, shares
from sfl.settings import Weights
from sfl.v1 import federation_pb2 as pb


class Gsfs(Strategy):
    """The server's side of GSFS, equations 12 to 14.

    (12) an upload of device k puts (delta theta_k, time, k) into the pool; (13) aggregation is due when the number of
    distinct devices in it reaches the quorum M, here a share of the devices that are present or yet to join,
    rounded up, at least one;
    (14) theta <- theta + sum over k in the pool of a_k * delta theta_k, where a_k is, of device k,

    - "frequency": its submissions so far over those of all devices in the pool (as printed);
    - "examples": its |D_k| over that of all devices in the pool;
    - "share": its |D_k| over that of all devices that take part, so that what a device has learnt counts alike whoever
      happens to be in the pool with it.

    Devices follow `triggered`, equations 7 to 11.
    """

    def __init__(self, quorum: float, weights: Weights, triggered: pb.Triggered, keep_progress: bool, final_upload: bool) -> None:
        self.final = final_upload
        self._quorum = quorum
        self._weights = weights
        self._policy = pb.UploadPolicy(keep_progress=keep_progress, final_upload=final_upload, triggered=triggered)

    def policy(self) -> pb.UploadPolicy:
        return self._policy

    def due(self, pooled: AbstractSet[str], present: AbstractSet[str], missing: int, waited_s: float) -> bool:
        needed = math.ceil(self._quorum * (len(present) + missing) - 1e-9)  # 0.7 * 10 is a little more than 7
        return len(pooled) >= max(1, needed)

    def weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        if self._weights == "share":
            return {update.device: update.examples / population for update in updates}
        if self._weights == "examples":
            return shares({update.device: update.examples for update in updates})
        return shares({update.device: update.submissions for update in updates})
