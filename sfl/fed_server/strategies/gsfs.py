"""GSFS (arXiv 2504.16032): devices upload when gradients or performance say so, a quorum of them makes a version."""

from __future__ import annotations

import math
from collections.abc import Sequence

from sfl.fed_server.strategies.base import Standing, Strategy, shares
from sfl.fed_server.updates import Update
from sfl.v1 import federation_pb2 as pb

MOST_PACED = 8.0  # times nearer to each other, or further apart, are uploads of a device with much or little data


class Gsfs(Strategy):
    """The server's side of GSFS, equations 12 to 14.

    (12) an upload of device k puts (delta theta_k, time, k) into the pool; (13) aggregation is due when the number of
    distinct devices in it reaches the quorum M, here a share of the devices that are present or yet to join,
    rounded up, at least one; or, with `quorum_of` "examples", when the devices in it have that share of these devices'
    training examples. With `reach`, devices that cannot be reached do not count, unless in the pool (see `Reach`);
    (14) theta <- theta + sum over k in the pool of a_k * delta theta_k, where a_k is, of device k,

    - "frequency": its submissions so far over those of all devices in the pool (as printed);
    - "examples": its |D_k| over that of all devices in the pool;
    - "share": its |D_k| over that of all devices that take part, so that what a device has learnt counts alike whoever
      happens to be in the pool with it;
    - "equal": one over the submissions in the pool.

    Devices follow equations 7 to 11.
    """

    def _rule(self, size: float) -> pb.UploadPolicy:
        chosen = self.settings
        triggered = pb.Triggered(
            alpha=chosen.alpha,
            beta=chosen.beta,
            min_steps=self._paced(chosen.min_steps, size),
            max_steps=self._paced(chosen.most_steps, size),
            validate_every=chosen.validate_every,
            reference_every=chosen.reference_every,
            threshold=chosen.threshold,
            threshold_growth=chosen.threshold_growth,
            threshold_decay=chosen.threshold_decay,
            metric=chosen.metric,
        )
        policy = pb.UploadPolicy(triggered=triggered)
        # Where progress cannot be kept, each version would cost a device all steps since its last upload.
        policy.adopt_after_upload = chosen.name == "gsfs" and not chosen.keep_progress
        if chosen.network:
            policy.triggered.network.budget = chosen.network_budget
            policy.triggered.network.lowest = chosen.network_lowest
            policy.triggered.network.highest = chosen.network_highest
        if chosen.feedback:
            policy.feedback.decrease = chosen.feedback_decrease
            policy.feedback.increase = chosen.feedback_increase
            policy.feedback.lowest = chosen.feedback_lowest
            policy.feedback.patience = chosen.feedback_patience
            policy.feedback.margin = chosen.feedback_margin
        return policy

    def _paced(self, steps: int, size: float) -> int:
        """So many steps, as a device with `size` times the mean of the data has them; 0 stays 0.

        What an update misses of the others' work grows with the steps it spans, i_k, and counts with its weight a_k. For a
        given number of uploads the sum of (a_k i_k)^2 over the devices is least when i_k is in proportion to a_k^(-2/3). So
        it is only where weights go by the data. The factor is bounded, as a size is what a device claims.
        """
        if not steps or self.settings.weights not in ("share", "examples"):
            return steps
        factor: float = min(max(size**-self.settings.pace, 1 / MOST_PACED), MOST_PACED)
        return max(1, round(steps * factor))

    def due(self, standing: Standing) -> bool:
        counted = {
            device: examples
            for device, examples in standing.present.items()
            if device in standing.pooled or device not in standing.unreachable
        }
        if self.settings.quorum_of == "examples" and counted:
            # Of those that have left, their examples are not known here; they count as one does on average.
            average = sum(counted.values()) / len(counted)
            pooled = sum(counted.get(device, average) for device in standing.pooled)
            return pooled >= self.settings.quorum * (sum(counted.values()) + standing.missing * average) * (1 - 1e-9)
        return len(standing.pooled) >= self.least_updates(len(counted) + standing.missing)

    def least_updates(self, devices: int) -> int:
        return max(1, math.ceil(self.settings.quorum * devices - 1e-9))  # 0.7 * 10 is a little more than 7

    def _weights(self, updates: Sequence[Update], population: int) -> dict[str, float]:
        if self.settings.weights == "share":
            return {update.device: update.examples / population for update in updates}
        if self.settings.weights == "examples":
            return shares({update.device: update.examples for update in updates})
        if self.settings.weights == "equal":
            submissions = sum(update.pooled for update in updates)
            return {update.device: 1 / submissions for update in updates}
        return shares({update.device: update.submissions for update in updates})
