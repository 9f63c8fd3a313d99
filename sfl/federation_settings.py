"""How updates become versions: strategy, LoRA merge, robust rule, privacy, each with its ranges, and what does not go together.

A setting that only some strategies read names them in brackets at the end of its description.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from sfl.base_settings import Settings

StrategyName = Literal[
    "gsfs",
    "gsfs-printed",
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "fedadagrad",
    "fedbuff",
    "splitlora",
]
MergeName = Literal["average", "ffa", "fedex", "flora", "flexlora", "flexlora-printed", "hetlora"]
RobustRule = Literal["none", "krum", "multi-krum", "bulyan", "median", "trimmed-mean", "norm-clip"]
Weights = Literal["frequency", "examples", "share", "equal"]

GSFS = ("gsfs", "gsfs-printed")
SERVER_OPTIMISERS = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")
# Merges whose versions are no sums of factors, so that what was learnt in one version's factors cannot be added to another's.
NOT_ADDITIVE = ("flora", "flexlora", "flexlora-printed")
LINEAR = ("average", "ffa")  # merges that are the plain weighted sum of the updates
COMBINING = ("median", "trimmed-mean", "bulyan")  # rules that make values that no device has sent

# Where a strategy's own defaults are not those of gsfs.
_ROUNDS: dict[str, Any] = {"weights": "examples", "keep_progress": False, "logit_adjustment": 0.0}
_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "gsfs-printed": {
        "weights": "frequency",
        "keep_progress": False,
        "logit_adjustment": 0.0,
        "final_upload": False,
        "quorum": 0.6,
        "min_steps": 1,
        "max_steps": 0,
        "pace": 0.0,
        "reference_every": 0,
        "threshold": 0.3,
        "threshold_growth": 1.0,
        "threshold_decay": 1.0,
    },
    "fedavg": _ROUNDS,
    "fedprox": {**_ROUNDS, "proximal": 0.01},
    "fedavgm": {**_ROUNDS, "server_rate": 0.1},
    "fedadam": {**_ROUNDS, "server_rate": 0.01},
    "fedyogi": {**_ROUNDS, "server_rate": 0.01},
    "fedadagrad": {**_ROUNDS, "server_rate": 0.01},
    "fedbuff": {"weights": "equal", "keep_progress": False, "logit_adjustment": 0.0, "staleness": 0.5},
    "splitlora": _ROUNDS,
}
_FIXED_WEIGHTS = {name: own["weights"] for name, own in _OWN_DEFAULTS.items() if name not in GSFS}


def _differs(name: str, description: str) -> str:
    """The description of a setting whose default is another with some strategies, with these defaults."""
    words = {True: "yes", False: "no"}
    strategies: dict[str, list[str]] = {}
    for strategy, values in _OWN_DEFAULTS.items():
        if name in values:
            value = values[name]
            strategies.setdefault(words[value] if isinstance(value, bool) else str(value), []).append(strategy)
    shown = (f"{value} with {', '.join(names)}" for value, names in strategies.items())
    return f"{description}; by default {'; '.join(shown)}"


class StrategySettings(Settings):
    """How updates become a new global version, and when devices upload; what is left open is the named strategy's default."""

    name: StrategyName = Field("gsfs", description="strategy")
    quorum: float = Field(
        0.05, gt=0, le=1, description=_differs("quorum", "fraction of the devices whose updates make a new version (gsfs)")
    )
    quorum_of: Literal["devices", "examples"] = Field(
        "devices", description="what the quorum is a fraction of: the devices, or their training examples (gsfs)"
    )
    weights: Weights = Field(
        "share",
        description=_differs(
            "weights",
            "a device's weight: its share of all submissions so far (frequency) or examples (examples) of the devices in the "
            "pool, or of the examples of all devices (share), or the same for each submission in the pool (equal)",
        ),
    )
    staleness: float = Field(
        0.0,
        ge=0,
        description=_differs("staleness", "a weight is multiplied by (1 + versions that its update is behind) ** -staleness"),
    )
    max_lag: int = Field(0, ge=0, description="updates that are more versions than this behind are refused; 0: none is")
    keep_progress: bool = Field(
        True, description=_differs("keep_progress", "keep what was learnt and not uploaded when a new version is adopted")
    )
    logit_adjustment: float = Field(
        0.7,
        ge=0,
        le=1,
        description=_differs(
            "logit_adjustment",
            "how much of the difference between a device's shares of the labels and those on all devices its training loss knows,"
            " so that it need not be learnt; 0: nothing",
        ),
    )
    final_upload: bool = Field(True, description=_differs("final_upload", "upload once more after the last step"))
    proximal: float = Field(
        0.0, ge=0, description=_differs("proximal", "mu of FedProx's proximal term, on both halves of every adapter")
    )
    local_steps: int = Field(10, ge=1, description="steps of a device between two uploads (all but gsfs)")
    round_timeout_s: float = Field(
        600.0,
        gt=0,
        description="seconds after which a round ends without those missing; with gsfs and fedbuff, which have no rounds, after"
        " which it is said who is missing; a robust rule waits no longer for more updates with any strategy",
    )
    buffer: int = Field(3, ge=1, description="submissions that make a new version (fedbuff)")
    server_rate: float = Field(
        1.0, gt=0, description=_differs("server_rate", "learning rate of the server's optimiser (fedavgm, fedadam and alike)")
    )
    server_momentum: float = Field(
        0.9, ge=0, lt=1, description="weight of the past in the server optimiser's first moment (fedavgm, fedadam and alike)"
    )
    server_second_momentum: float = Field(
        0.99, ge=0, lt=1, description="weight of the past in the server optimiser's second moment (fedadam, fedyogi)"
    )
    server_tau: float = Field(
        1e-3, gt=0, description="what is added to the root of the second moment (fedadam, fedyogi, fedadagrad)"
    )
    alpha: float = Field(0.9, gt=0, lt=1, description="smoothing of the gradient norm's moving mean and deviation (gsfs)")
    beta: float = Field(2.0, ge=0, description="deviations above the mean that make a gradient norm trigger (gsfs)")
    min_steps: int = Field(
        8, ge=1, description=_differs("min_steps", "least number of steps between two uploads of a device (gsfs)")
    )
    pace: float = Field(
        2 / 3,
        ge=0,
        le=1,
        description=_differs(
            "pace",
            "min_steps and max_steps of a device are multiplied by (mean examples of all devices / its own) ** pace, at most 8"
            " times as many or as few, where weights go by examples (gsfs)",
        ),
    )
    max_steps: int | None = Field(
        None,
        ge=0,
        description=_differs(
            "max_steps", "most steps between two uploads of a device; left out: twice min_steps; 0: no bound (gsfs)"
        ),
    )
    validate_every: int = Field(10, ge=0, description="steps between two local validations; 0: none (gsfs)")
    reference_every: int = Field(
        10,
        ge=0,
        description=_differs(
            "reference_every",
            "steps for which a validation after an adoption stays the reference of the performance trigger, however many versions"
            " are adopted meanwhile; 0: each adoption is validated (gsfs)",
        ),
    )
    threshold: float = Field(
        0.1,
        gt=0,
        description=_differs(
            "threshold", "change of the metric that triggers an upload, as a share of its reference, at the start (gsfs)"
        ),
    )
    threshold_growth: float = Field(
        1.5, ge=1, description=_differs("threshold_growth", "factor on the threshold after it triggered (gsfs)")
    )
    threshold_decay: float = Field(
        0.8, gt=0, le=1, description=_differs("threshold_decay", "factor on the threshold after it did not trigger (gsfs)")
    )
    metric: Literal["loss", "accuracy", "f1"] = Field("loss", description="metric of the local validation that is watched (gsfs)")
    network: bool = Field(False, description="the triggers follow what an upload costs (gsfs)")
    network_budget: float = Field(
        0.1, gt=0, description="share of a device's time that uploads may take before the triggers become slower (gsfs)"
    )
    network_lowest: float = Field(0.5, gt=0, le=1, description="least factor on the triggers, behind a good link (gsfs)")
    network_highest: float = Field(4.0, ge=1, description="greatest factor on the triggers, behind a bad link (gsfs)")
    reach: bool = Field(
        False,
        description="the quorum does not count devices that cannot be reached: whose last upload had to be sent again, or that"
        " are overdue (gsfs)",
    )
    overdue: float = Field(
        3.0,
        ge=0,
        description="with reach, a device that has been silent for so many times its usual time between two uploads does not"
        " count for the quorum; 0: it always does (gsfs)",
    )
    feedback: bool = Field(False, description="the learning rate follows the local validations (gsfs)")
    feedback_decrease: float = Field(0.5, gt=0, le=1, description="factor on the learning rate when it got worse (gsfs)")
    feedback_increase: float = Field(1.1, ge=1, description="factor on the learning rate when it got better (gsfs)")
    feedback_lowest: float = Field(0.1, gt=0, le=1, description="least of the product of these factors (gsfs)")
    feedback_patience: int = Field(2, ge=1, description="validations in a row that must be worse (gsfs)")
    feedback_margin: float = Field(0.02, ge=0, description="how much worse than the best counts, as a share of it (gsfs)")

    @property
    def most_steps(self) -> int:
        """Most steps between two uploads of a device, before its pace; 0: no bound."""
        return 2 * self.min_steps if self.max_steps is None else self.max_steps

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """What is left open, or None, by the defaults of the strategy that is named."""
        if not isinstance(given, dict):
            return given
        chosen = {name: value for name, value in given.items() if value is not None}
        return {**_OWN_DEFAULTS.get(str(given.get("name")), {}), **chosen}

    @model_validator(mode="after")
    def _check(self) -> StrategySettings:
        fixed = _FIXED_WEIGHTS.get(self.name, self.weights)
        if self.weights != fixed:
            raise ValueError(f"{self.name} weighs by {fixed}: strategy.weights '{self.weights}' needs gsfs")
        if self.name not in GSFS:
            for switch in ("network", "reach", "feedback"):
                if getattr(self, switch):
                    raise ValueError(f"strategy.{switch} needs gsfs: strategy.name is {self.name}, leave strategy.{switch} out")
        if self.feedback and not self.validate_every:
            raise ValueError("strategy.feedback needs local validations: set strategy.validate_every above 0")
        if self.max_steps and self.max_steps < self.min_steps:
            raise ValueError(
                f"strategy.max_steps {self.max_steps} is less than strategy.min_steps {self.min_steps}: raise the first or lower"
                " the second"
            )
        return self


class RobustSettings(Settings):
    """What keeps attackers among the devices from having their way."""

    rule: RobustRule = Field(
        "none",
        description="robust rule; norm-clip bounds an update's norm and not its weight, which goes by the number of examples that"
        " the device claims unless strategy.weights is equal or frequency",
    )
    attackers: int = Field(1, ge=0, description="number of attackers that the rule is to bear")
    norm: float = Field(0.0, ge=0, description="greatest norm of an update (norm-clip); 0: the median of the norms in the pool")
    too_few: Literal["wait", "refuse"] = Field(
        "wait",
        description="when the pool has fewer updates than the rule needs for its attackers: wait for more while devices that"
        " could give them are there, at most strategy.round_timeout_s, or refuse these",
    )


class PrivacySettings(Settings):
    """Differential privacy of the devices' updates: each is clipped and their sum gets noise."""

    clip: float = Field(0.0, ge=0, description="greatest norm of a device's update in one version; 0: no privacy")
    noise: float = Field(
        0.0,
        ge=0,
        description="standard deviation of the noise of each version, times the clip and the greatest weight: less in all where a"
        " version has many updates (strategy.quorum)",
    )
    delta: float = Field(1e-5, gt=0, lt=1, description="probability with which epsilon may not hold")
    epsilon: float = Field(0.0, ge=0, description="each device's budget, after which its updates are refused; 0: no bound")
    seed: int | None = Field(None, ge=0, description="seed of the noise; left out: from the operating system")

    @property
    def on(self) -> bool:
        """Whether updates are clipped at all."""
        return self.clip > 0

    @model_validator(mode="after")
    def _check(self) -> PrivacySettings:
        if self.noise and not self.clip:
            raise ValueError("privacy.noise needs privacy.clip: set privacy.clip to the greatest norm that an update may have")
        if self.epsilon and not self.noise:
            raise ValueError("privacy.epsilon is a budget for noise: set privacy.noise above 0, or leave privacy.epsilon out")
        return self


def fitting(strategy: StrategySettings, merge: str, private: bool) -> StrategySettings:
    """`strategy` with the defaults that `merge` and privacy need: nothing kept where progress cannot be added to the next
    version, and no logit adjustment where what one example changes is to be hidden."""
    needed: dict[str, Any] = {"keep_progress": False} if merge in NOT_ADDITIVE else {}
    if private:
        needed["logit_adjustment"] = 0.0
    left_open = {name: value for name, value in needed.items() if name not in strategy.model_fields_set}
    return strategy.model_copy(update=left_open) if left_open else strategy


def check_together(strategy: StrategySettings, merge: str, robust: RobustSettings, privacy: PrivacySettings) -> None:
    """Raise `ValueError`, naming two settings that contradict each other and what to do."""
    name, rule = strategy.name, robust.rule
    if merge in NOT_ADDITIVE:
        why = f"merge {merge} makes new factors in every version"
        if strategy.keep_progress:
            raise ValueError(f"{why}, to which strategy.keep_progress could add nothing: set strategy.keep_progress to false")
        if name in SERVER_OPTIMISERS:
            raise ValueError(f"{why}, which have no moments: strategy.name {name} needs merge average, ffa or hetlora")
        if rule in COMBINING:
            raise ValueError(f"{why}: robust.rule {rule} would mix values that do not belong together; choose another of the two")
    if merge == "fedex" and name in SERVER_OPTIMISERS:
        raise ValueError(
            f"merge fedex makes the average exact, and strategy.name {name} goes elsewhere: choose merge average, ffa or hetlora"
        )
    if privacy.on and merge not in LINEAR:
        raise ValueError(
            f"privacy.clip bounds what a device adds to a sum, and merge {merge} is none: choose merge ffa or average, or leave"
            " privacy.clip out"
        )
    if privacy.on and not (rule == "none" or (rule == "norm-clip" and robust.norm)):
        raise ValueError(
            f"robust.rule {rule} judges an update by all others, so privacy.clip does not bound what one device changes: leave"
            " one of the two out, or choose norm-clip with a robust.norm above 0"
        )
    if privacy.on and strategy.logit_adjustment:
        raise ValueError(
            "privacy.clip hides what one device's examples change, and strategy.logit_adjustment goes by how many of each label"
            " there are: leave one of the two out"
        )
    if name == "splitlora":
        for setting, wrong in (
            (f"merge {merge}", merge not in LINEAR),
            (f"robust.rule {rule}", rule != "none"),
            ("privacy.clip", privacy.on),
        ):
            if wrong:
                raise ValueError(
                    f"strategy.name splitlora adds up pieces of one adapter that all devices share, so {setting} has no update"
                    " of each device to look at; leave it out or choose another strategy"
                )
