"""The learning rate follows what local validations show: the adaptive feedback loop of the GSFS paper."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sfl.errors import WireError
from sfl.v1.federation_pb2 import Feedback, UploadPolicy

_FLOOR = 0.05  # of the best loss when the margin is taken from it, as with the performance threshold


class RateController:
    """A factor on the learning rate's schedule, moved after each local validation by its loss L against the best one yet, L*:

        L < L*:                                      factor <- min(1, factor * increase), L* <- L
        L > L* + margin * max(L*, 0.05), `patience`
        times in a row:                              factor <- max(lowest, factor * decrease), and the row begins anew

    It begins at 1. The paper names the loop and leaves the controller open. A loss that is not a number counts as worse.
    Raises `WireError` for a controller that could not work.
    """

    def __init__(self, feedback: Feedback) -> None:
        shares = 0 < feedback.decrease <= 1 and 0 < feedback.lowest <= 1
        if not (shares and 1 <= feedback.increase < math.inf and 0 <= feedback.margin < math.inf and feedback.patience):
            raise WireError(
                "the federation asks for a feedback on the learning rate that cannot be:"
                f" decrease {feedback.decrease:g} and lowest {feedback.lowest:g} are above 0 and at most 1,"
                f" increase {feedback.increase:g} is at least 1, margin {feedback.margin:g} at least 0 and"
                f" patience {feedback.patience} at least 1; mend the federation server's settings"
            )
        self.factor = 1.0
        self._feedback = feedback
        self._best = math.inf
        self._worse = 0  # looks in a row

    def look(self, loss: float) -> None:
        """Take one local validation's mean loss."""
        if loss < self._best:
            self.factor = min(1.0, self.factor * self._feedback.increase)
            self._best = loss
            self._worse = 0
            return
        bearable = loss <= self._best + self._feedback.margin * max(self._best, _FLOOR)
        self._worse = 0 if bearable else self._worse + 1
        if self._worse >= self._feedback.patience:
            self.factor = max(self._feedback.lowest, self.factor * self._feedback.decrease)
            self._worse = 0

    def state(self) -> dict[str, Any]:
        """What it has seen so far, JSON-serialisable."""
        return {"factor": self.factor, "best": self._best, "worse": self._worse}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where the controller was whose `state` this is."""
        self.factor, self._best, self._worse = state["factor"], state["best"], state["worse"]


def rate_controller(policy: UploadPolicy) -> RateController | None:
    """The controller that the federation server asks for, if any."""
    return RateController(policy.feedback) if policy.HasField("feedback") else None
