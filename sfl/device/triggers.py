"""When a device uploads: GSFS's two triggers (papers' equations 7 to 11) and FedAvg's fixed rounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from sfl.device.trainer import Figures
from sfl.errors import WireError
from sfl.v1.federation_pb2 import Periodic, Triggered, UploadPolicy


class UploadRule(Protocol):
    """Decides after each step whether the device uploads; a new one begins with each device."""

    waits: bool  # for the next version after an upload
    validates: bool  # after some steps and after each adoption

    def validation_due(self) -> bool:
        """Whether the step that is now being done should end with a local validation."""

    def after_step(self, layer_norms: Mapping[int, float], figures: Figures | None) -> str | None:
        """Take a step's gradient norms by layer, and the validation if one was due; the trigger's name if one fired."""

    def after_upload(self) -> None:
        """Progress counts from here."""

    def after_adoption(self, figures: Figures | None) -> None:
        """A new global version was taken over; `figures` are those of its local validation, if the rule validates."""


class GradientTrigger:
    """Fires when a layer's gradient norm leaves its usual range (equations 9 to 11), for each layer l:

        mu <- alpha mu + (1 - alpha) ||g||
        sigma <- alpha sigma + (1 - alpha) | ||g|| - mu |
        fire when ||g|| > mu + beta sigma

    mu begins at the first norm and sigma at 0. The paper prints the second line without the bars of an absolute value,
    with which sigma could sink below zero.
    """

    def __init__(self, alpha: float, beta: float) -> None:
        self._alpha = alpha
        self._beta = beta
        self._mu: dict[int, float] = {}
        self._sigma: dict[int, float] = {}

    def observe(self, layer_norms: Mapping[int, float]) -> bool:
        """Take one step's norms; True if any layer fires."""
        fired = False
        for layer, norm in layer_norms.items():
            mu = self._mu.get(layer, norm)
            mu += (1 - self._alpha) * (norm - mu)  # equation 9 so written that equal norms leave mu equal, to the bit
            sigma = self._alpha * self._sigma.get(layer, 0.0) + (1 - self._alpha) * abs(norm - mu)
            self._mu[layer], self._sigma[layer] = mu, sigma
            fired = fired or norm > mu + self._beta * sigma
        return fired


class PerformanceTrigger:
    """Fires when the validation metric M has moved away from its reference (equations 7 and 8):

        dM = | M(theta_t) - M(theta_ref) | > delta

    The paper leaves open how delta adapts. Here it is a share of the reference, `threshold * max(|M_ref|, 0.05)`; after
    a look that fired the share is multiplied by `growth`, after one that did not by `decay`, so that a busy device
    uploads less often and one that never fires comes closer to it with every look.
    """

    def __init__(self, metric: str, threshold: float, growth: float, decay: float) -> None:
        self._metric = metric
        self._threshold = threshold
        self._growth = growth
        self._decay = decay
        self._reference: float | None = None

    def observe(self, figures: Figures) -> bool:
        """Take one local validation. The first one sets the reference and does not fire."""
        value = self._value(figures)
        if self._reference is None:
            self._reference = value
            return False
        fired = abs(value - self._reference) > self._threshold * max(abs(self._reference), 0.05)
        self._threshold *= self._growth if fired else self._decay
        return fired

    def refer_to(self, figures: Figures) -> None:
        """Measure from here on."""
        self._reference = self._value(figures)

    def _value(self, figures: Figures) -> float:
        value = {"loss": figures.loss, "accuracy": figures.accuracy, "f1": figures.f1_macro}.get(self._metric)
        if value is None:
            raise WireError(f"the federation watches '{self._metric}', which this task does not have; choose loss")
        return value


class TriggeredUploads:
    """GSFS: upload when either trigger fires, at least `min_steps` steps apart, and never wait.

    A local validation is due `validate_every` steps after the last one, however often was uploaded since, and no sooner than
    an upload is possible. With `validate_every` 0 nothing is validated and the performance trigger never fires.
    """

    waits = False

    def __init__(self, policy: Triggered) -> None:
        self.validates = policy.validate_every > 0
        self._gradient = GradientTrigger(policy.alpha, policy.beta)
        self._performance = PerformanceTrigger(policy.metric, policy.threshold, policy.threshold_growth, policy.threshold_decay)
        self._min_steps = policy.min_steps
        self._validate_every = policy.validate_every
        self._steps = 0  # since the last upload
        self._unseen = 0  # steps since the last validation that was due

    def validation_due(self) -> bool:
        return self.validates and self._steps + 1 >= self._min_steps and self._unseen + 1 >= self._validate_every

    def after_step(self, layer_norms: Mapping[int, float], figures: Figures | None) -> str | None:
        self._steps += 1
        self._unseen = 0 if figures is not None else self._unseen + 1
        gradient = self._gradient.observe(layer_norms)
        performance = figures is not None and self._performance.observe(figures)
        if self._steps < self._min_steps:
            return None
        return "performance" if performance else "gradient" if gradient else None

    def after_upload(self) -> None:
        self._steps = 0

    def after_adoption(self, figures: Figures | None) -> None:
        if figures is not None:
            self._performance.refer_to(figures)


class PeriodicUploads:
    """Synchronous rounds: upload every `local_steps` steps and wait for the next version."""

    waits = True
    validates = False

    def __init__(self, policy: Periodic) -> None:
        self._local_steps = policy.local_steps
        self._steps = 0

    def validation_due(self) -> bool:
        return False

    def after_step(self, layer_norms: Mapping[int, float], figures: Figures | None) -> str | None:
        self._steps += 1
        return "round" if self._steps >= self._local_steps else None

    def after_upload(self) -> None:
        self._steps = 0

    def after_adoption(self, figures: Figures | None) -> None:
        self._steps = 0


def upload_rule(policy: UploadPolicy) -> UploadRule:
    """The rule that the federation server asks for. Raises `WireError` for one that this version does not know."""
    kind = policy.WhichOneof("rule")
    if kind == "periodic":
        return PeriodicUploads(policy.periodic)
    if kind == "triggered":
        return TriggeredUploads(policy.triggered)
    raise WireError("the federation server asks for an upload rule that this version does not know; update this device")
