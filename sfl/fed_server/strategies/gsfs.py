"""GSFS (arXiv 2504.16032): devices upload when gradients or performance say so, a quorum of them makes a version."""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

from sfl.fed_server.strategies.base import Strategy, Update, shares
from sfl.v1 import federation_pb2 as pb

Weights = Literal["frequency", "examples", "both"]


class Gsfs(Strategy):
    """The server's side of GSFS, equations 12 to 14.

    (12) an upload of device k puts (delta theta_k, time, k) into the pool; (13) aggregation is due when the number of
    distinct devices in it reaches the quorum M, here a share of the present devices, rounded up, at least one;
    (14) theta <- theta + sum over k in the pool of a_k * delta theta_k, the a_k with sum 1 in proportion to

    - "frequency": the submissions of device k so far (as printed);
    - "examples": |D_k|;
    - "both": their product.

    Devices follow `triggered`, equations 7 to 11.
    """

    def __init__(self, quorum: float, weights: Weights, triggered: pb.Triggered, keep_progress: bool, final_upload: bool) -> None:
        self.final = final_upload
        self._quorum = quorum
        self._weights = weights
        self._policy = pb.UploadPolicy(keep_progress=keep_progress, final_upload=final_upload, triggered=triggered)

    def policy(self) -> pb.UploadPolicy:
        return self._policy

    def due(self, pooled: AbstractSet[str], present: AbstractSet[str], waited_s: float) -> bool:
        needed = math.ceil(self._quorum * len(present) - 1e-9)  # 0.7 * 10 is a little more than 7
        return len(pooled) >= max(1, needed)

    def weights(self, updates: Sequence[Update]) -> dict[str, float]:
        by_rule = {
            "frequency": {update.device: update.submissions for update in updates},
            "examples": {update.device: update.examples for update in updates},
            "both": {update.device: update.submissions * update.examples for update in updates},
        }
        return shares(by_rule[self._weights])
