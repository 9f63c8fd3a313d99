"""When a device uploads: GSFS's two triggers (papers' equations 7 to 11) and FedAvg's fixed rounds.

The paper says that GSFS follows the network and not how. Here all thresholds are multiplied by one factor, 1 where the
federation server does not ask for it:

    f = clamp(seconds of an upload / (budget * min_steps * seconds of a step), lowest, highest)

Uploads are at least f * min_steps steps apart, so they take no more than `budget` of the time that the device trains, unless
`highest` forbids it; behind a good link they are closer to each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

from sfl.device.trainer import Figures
from sfl.errors import WireError
from sfl.v1.federation_pb2 import NetworkSense, Periodic, Triggered, UploadPolicy


class UploadRule(Protocol):
    """Decides after each step whether the device uploads; a new one begins with each device."""

    waits: bool  # for the next version after an upload
    factor: float  # on the thresholds, from what uploads cost

    def follow(self, policy: UploadPolicy) -> None:
        """Hear before a step how far apart uploads are to be: the federation server says so anew when it has met all devices."""

    def sense(self, upload_s: float, step_s: float) -> None:
        """Hear how many seconds the next upload will take and a step takes, before `validation_due`."""

    def validation_due(self) -> bool:
        """Whether the step that is now being done should end with a local validation."""

    def reference_due(self) -> bool:
        """Whether the version that has just been taken over should be validated; the first one among them."""

    def after_step(self, layer_norms: Mapping[int, float], figures: Figures | None) -> str | None:
        """Take a step's gradient norms by layer, and the validation if one was due; the trigger's name if one fired."""

    def after_upload(self) -> None:
        """Progress counts from here."""

    def after_adoption(self, figures: Figures | None) -> None:
        """A new global version was taken over; `figures` are those of its local validation, if that was due."""

    def state(self) -> dict[str, Any]:
        """What it has learnt so far, JSON-serialisable."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from where the rule of this kind was whose `state` this is."""


class GradientTrigger:
    """Fires when a layer's gradient norm leaves its usual range (equations 9 to 11), for each layer l:

        mu <- alpha mu + (1 - alpha) ||g||
        sigma <- alpha sigma + (1 - alpha) | ||g|| - mu |
        fire when ||g|| > mu + f beta sigma, f being 1 as printed

    mu begins at the first norm and sigma at 0. The paper prints the second line without the bars of an absolute value,
    with which sigma could sink below zero.
    """

    def __init__(self, alpha: float, beta: float) -> None:
        self._alpha = alpha
        self._beta = beta
        self._mu: dict[int, float] = {}
        self._sigma: dict[int, float] = {}

    def observe(self, layer_norms: Mapping[int, float], factor: float = 1.0) -> bool:
        """Take one step's norms; True if any layer fires with `factor` as f."""
        fired = False
        for layer, norm in layer_norms.items():
            mu = self._mu.get(layer, norm)
            mu += (1 - self._alpha) * (norm - mu)  # equation 9 so written that equal norms leave mu equal, to the bit
            sigma = self._alpha * self._sigma.get(layer, 0.0) + (1 - self._alpha) * abs(norm - mu)
            self._mu[layer], self._sigma[layer] = mu, sigma
            fired = fired or norm > mu + factor * self._beta * sigma
        return fired

    def state(self) -> dict[str, Any]:
        return {"mu": sorted(self._mu.items()), "sigma": sorted(self._sigma.items())}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._mu, self._sigma = dict(state["mu"]), dict(state["sigma"])


class PerformanceTrigger:
    """Fires when the validation metric M has moved away from its reference (equations 7 and 8):

        dM = | M(theta_t) - M(theta_ref) | > f delta, f being 1 as printed

    The paper leaves open how delta adapts. Here it is a share of the reference, `threshold * max(|M_ref|, 0.05)`; after
    a look that fired the share is multiplied by `growth`, after one that did not by `decay`, so that a busy device
    uploads less often and one that never fires comes closer to it with every look. The share would make up for a factor
    f in time, by falling until as many looks fire as ever; so it falls by `decay ** (1 / f)`.
    """

    def __init__(self, metric: str, threshold: float, growth: float, decay: float) -> None:
        self._metric = metric
        self._threshold = threshold
        self._growth = growth
        self._decay = decay
        self._reference: float | None = None

    def observe(self, figures: Figures, factor: float = 1.0) -> bool:
        """Take one local validation, with `factor` as f. The first one sets the reference and does not fire."""
        value = self._value(figures)
        if self._reference is None:
            self._reference = value
            return False
        fired = abs(value - self._reference) > factor * self._threshold * max(abs(self._reference), 0.05)
        self._threshold *= self._growth if fired else self._decay ** (1 / factor)
        return fired

    def refer_to(self, figures: Figures) -> None:
        """Measure from here on."""
        self._reference = self._value(figures)

    def state(self) -> dict[str, Any]:
        return {"threshold": self._threshold, "reference": self._reference}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._threshold, self._reference = state["threshold"], state["reference"]

    def _value(self, figures: Figures) -> float:
        value = {"loss": figures.loss, "accuracy": figures.accuracy, "f1": figures.f1_macro}.get(self._metric)
        if value is None:
            raise WireError(f"the federation watches '{self._metric}', which this task does not have; choose loss")
        return value


class TriggeredUploads:
    """GSFS: upload when either trigger fires, at least `min_steps` steps apart, and never wait.

    With `max_steps` an upload comes that many steps after the last one at the latest, "overdue". A factor multiplies
    both distances, but one below 1 only `min_steps`: a good link is no reason to send what no trigger asks for.
    A local validation is due `validate_every` steps after the last one, however often was uploaded since, and no sooner than
    an upload is possible. With `validate_every` 0 nothing is validated and the performance trigger never fires.
    theta_ref is the version that was adopted last of those that were validated: the first one, and each that comes
    `reference_every` steps or more after the one before. To validate all would cost more than to train where versions come fast.
    """

    waits = False

    def __init__(self, policy: Triggered) -> None:
        """Raises `WireError` for bounds of the factor that cannot be."""
        self.factor = 1.0
        self._gradient = GradientTrigger(policy.alpha, policy.beta)
        self._performance = PerformanceTrigger(policy.metric, policy.threshold, policy.threshold_growth, policy.threshold_decay)
        self._network = _checked(policy.network) if policy.HasField("network") else None
        self._min_steps = policy.min_steps
        self._max_steps = policy.max_steps
        self._validate_every = policy.validate_every
        self._reference_every = policy.reference_every
        self._steps = 0  # since the last upload
        self._unseen = 0  # steps since the last validation that was due
        self._referred: int | None = None  # steps since the reference was set

    def follow(self, policy: UploadPolicy) -> None:
        if policy.HasField("triggered"):
            self._min_steps, self._max_steps = policy.triggered.min_steps, policy.triggered.max_steps

    def sense(self, upload_s: float, step_s: float) -> None:
        if self._network is not None:
            self.factor = threshold_factor(self._network, self._min_steps, upload_s, step_s)

    def validation_due(self) -> bool:
        validates = self._validate_every > 0
        return validates and self._steps + 1 >= self._least() and self._unseen + 1 >= self._validate_every

    def reference_due(self) -> bool:
        return self._validate_every > 0 and (self._referred is None or self._referred >= self._reference_every)

    def after_step(self, layer_norms: Mapping[int, float], figures: Figures | None) -> str | None:
        self._steps += 1
        if self._referred is not None:
            self._referred += 1
        self._unseen = 0 if figures is not None else self._unseen + 1
        gradient = self._gradient.observe(layer_norms, self.factor)
        performance = figures is not None and self._performance.observe(figures, self.factor)
        if self._steps < self._least():
            return None
        if performance or gradient:
            return "performance" if performance else "gradient"
        return "overdue" if 0 < self._max_steps <= self._steps / max(self.factor, 1.0) else None

    def after_upload(self) -> None:
        self._steps = 0

    def after_adoption(self, figures: Figures | None) -> None:
        if figures is not None:
            self._performance.refer_to(figures)
            self._referred = 0

    def state(self) -> dict[str, Any]:
        return {
            "factor": self.factor,
            "steps": self._steps,
            "unseen": self._unseen,
            "referred": self._referred,
            "gradient": self._gradient.state(),
            "performance": self._performance.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self.factor, self._steps, self._unseen = state["factor"], state["steps"], state["unseen"]
        self._referred = state["referred"]
        self._gradient.restore(state["gradient"])
        self._performance.restore(state["performance"])

    def _least(self) -> int:
        """Steps between two uploads."""
        return math.ceil(self.factor * self._min_steps - 1e-9)


class PeriodicUploads:
    """Synchronous rounds: upload every `local_steps` steps and wait for the next version."""

    waits = True
    factor = 1.0

    def __init__(self, policy: Periodic) -> None:
        self._local_steps = policy.local_steps
        self._steps = 0

    def follow(self, policy: UploadPolicy) -> None:
        """Rounds are alike for all."""

    def sense(self, upload_s: float, step_s: float) -> None:
        """Rounds come when they come."""

    def validation_due(self) -> bool:
        return False

    def reference_due(self) -> bool:
        return False

    def after_step(self, layer_norms: Mapping[int, float], figures: Figures | None) -> str | None:
        self._steps += 1
        return "round" if self._steps >= self._local_steps else None

    def after_upload(self) -> None:
        self._steps = 0

    def after_adoption(self, figures: Figures | None) -> None:
        self._steps = 0

    def state(self) -> dict[str, Any]:
        return {"steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._steps = state["steps"]


def threshold_factor(network: NetworkSense, min_steps: int, upload_s: float, step_s: float) -> float:
    """f, from the seconds of an upload and of a step."""
    allowed_s = network.budget * max(min_steps, 1) * step_s
    return min(max(upload_s / max(allowed_s, 1e-9), network.lowest), network.highest)


def _checked(network: NetworkSense) -> NetworkSense:
    if not (network.budget > 0 and 0 < network.lowest <= network.highest < math.inf):
        raise WireError(
            f"the federation has its devices sense the network with budget {network.budget:g}, lowest {network.lowest:g} and"
            f" highest {network.highest:g}: they must be above 0, and lowest not above highest; mend its server's settings"
        )
    return network


def upload_rule(policy: UploadPolicy) -> UploadRule:
    """The rule that the federation server asks for. Raises `WireError` for one that is unknown here or cannot be."""
    kind = policy.WhichOneof("rule")
    if kind == "periodic":
        return PeriodicUploads(policy.periodic)
    if kind == "triggered":
        return TriggeredUploads(policy.triggered)
    raise WireError("the federation server asks for an upload rule that this version does not know; update this device")
