"""What each daemon is told: one model per daemon, every setting with its meaning, default and range.

Descriptions become the help texts of the command line (`sfl.cli.load_settings`). Nothing here needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sfl.adapters.layout import LoraSpec
from sfl.data.settings import DataSettings, Task
from sfl.errors import SettingsError
from sfl.wire.address import check_address

Precision = Literal["fp32", "bf16", "int8", "nf4"]
Compute = Literal["fp32", "bf16"]
RunOn = Literal["cpu", "cuda"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]
Weights = Literal["frequency", "examples", "share"]


def compute_format(precision: Precision, compute: Compute | None = None) -> Compute:
    """The number format of activations; where none is asked for, fp32 for an fp32 base and else bf16."""
    return compute or ("fp32" if precision == "fp32" else "bf16")


def _check_address(address: str) -> str:
    try:
        check_address(address)
    except SettingsError as error:
        raise ValueError(str(error)) from error
    return address


def _check_name(name: str) -> str:
    if not name.strip() or any(character in "/\\" or not character.isprintable() for character in name):
        raise ValueError("a name is not empty and holds no slash, backslash or control character")
    return name


def _distinct(labels: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(labels)))


def _check_cut(cut: Any) -> Any:
    """Before the type is looked at, as a union's own errors are two for one mistake."""
    number = int(cut) if isinstance(cut, str) and cut.strip().isdigit() else cut
    if cut != "auto" and not (isinstance(number, int) and not isinstance(number, bool) and number >= 1):
        raise ValueError("a cut is a number of blocks, 1 or more, or auto")
    return number


Cut = Annotated[int | Literal["auto"], BeforeValidator(_check_cut)]
Address = Annotated[str, AfterValidator(_check_address)]
Name = Annotated[str, AfterValidator(_check_name)]


class Settings(BaseModel):
    """Base of all settings: never changed once read, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def written(self) -> dict[str, Any]:
        """Plain values that are read back to the same settings; those that are None are left out."""
        return self.model_dump(mode="json", exclude_none=True)


class LoraSettings(Settings):
    """The adapter's shape; the same on every device and edge of one federation."""

    rank: int = Field(8, ge=1, description="rank of the LoRA matrices")
    alpha: float = Field(16.0, gt=0, description="LoRA alpha; updates are scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout before the LoRA matrices, in training only")
    target_modules: tuple[str, ...] = Field(
        (), description="modules inside a block that get LoRA, such as q_proj; empty: peft's default for the model's family"
    )

    def spec(self) -> LoraSpec:
        """The same as the plain data that adapters carry."""
        return LoraSpec(self.rank, self.alpha, self.dropout, self.target_modules)


class OptimizerSettings(Settings):
    """The local optimiser; a device and its edge use the same."""

    name: Literal["adamw", "sgd"] = Field("adamw", description="optimiser of the adapter")
    learning_rate: float = Field(1e-3, gt=0, description="learning rate")
    weight_decay: float = Field(0.0, ge=0, description="weight decay")
    schedule: Literal["constant", "linear"] = Field(
        "constant", description="learning rate over the device's steps: the same, or down to 0 in a straight line"
    )


# Where a strategy's own defaults are not those of gsfs.
_OWN_DEFAULTS: dict[str, dict[str, Any]] = {
    "gsfs-printed": {
        "weights": "frequency",
        "keep_progress": False,
        "final_upload": False,
        "min_steps": 1,
        "threshold": 0.3,
        "threshold_growth": 1.0,
        "threshold_decay": 1.0,
    },
    "fedavg": {"weights": "examples", "keep_progress": False},
}


def _differs(name: str, description: str) -> str:
    """The description of a setting whose default is another with some strategies, with these defaults."""
    words = {True: "yes", False: "no"}
    own = {strategy: values[name] for strategy, values in _OWN_DEFAULTS.items() if name in values}
    shown = (f"{words[value] if isinstance(value, bool) else value} with {strategy}" for strategy, value in own.items())
    return f"{description}; by default {', '.join(shown)}"


class StrategySettings(Settings):
    """How updates become a new global version, and when devices upload; what is left open is the named strategy's default."""

    name: Literal["gsfs", "gsfs-printed", "fedavg"] = Field("gsfs", description="strategy")
    quorum: float = Field(0.6, gt=0, le=1, description="fraction of the devices whose updates make a new version")
    weights: Weights = Field(
        "share",
        description=_differs(
            "weights",
            "a device's weight: its share of all submissions so far (frequency) or examples (examples) of the devices in the "
            "pool, or of the examples of all devices (share)",
        ),
    )
    keep_progress: bool = Field(
        True, description=_differs("keep_progress", "keep what was learnt and not uploaded when a new version is adopted")
    )
    final_upload: bool = Field(True, description=_differs("final_upload", "upload once more after the last step"))
    local_steps: int = Field(10, ge=1, description="steps of a device in a round (fedavg)")
    round_timeout_s: float = Field(600.0, gt=0, description="seconds after which a round ends without those missing (fedavg)")
    alpha: float = Field(0.9, gt=0, lt=1, description="smoothing of the gradient norm's moving mean and deviation (gsfs)")
    beta: float = Field(2.0, ge=0, description="deviations above the mean that make a gradient norm trigger (gsfs)")
    min_steps: int = Field(
        10, ge=1, description=_differs("min_steps", "least number of steps between two uploads of a device (gsfs)")
    )
    validate_every: int = Field(10, ge=0, description="steps between two local validations; 0: none (gsfs)")
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

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, given: Any) -> Any:
        """What is left open by the defaults of the strategy that is named."""
        if not isinstance(given, dict):
            return given
        return {**_OWN_DEFAULTS.get(str(given.get("name")), {}), **given}

    @model_validator(mode="after")
    def _check(self) -> StrategySettings:
        if self.name == "fedavg" and self.weights != "examples":
            raise ValueError(f"fedavg weighs by examples: strategy.weights '{self.weights}' needs gsfs")
        return self


class DaemonSettings(Settings):
    """What all three daemons are told."""

    name: Name = Field(description="this daemon's name, its own in the federation")
    out: Path = Field(description="folder for metrics.jsonl")
    log_level: LogLevel = Field("INFO", description="least severe messages that are logged")


class FedSettings(DaemonSettings):
    """The federation server."""

    name: Name = Field("fed", description="this daemon's name, its own in the federation")
    listen: Address = Field("127.0.0.1:7300", description="host:port to serve on")
    out: Path = Field(Path("out/fed"), description="folder for metrics.jsonl")
    adapters: Path | None = Field(None, description="folder for the versions of the adapter; by default adapters inside out")
    devices: int = Field(ge=1, description="number of devices that take part")
    labels: Annotated[tuple[str, ...], AfterValidator(_distinct)] = Field(
        (), description="labels fixed beforehand; empty: all that the devices have seen"
    )
    strategy: StrategySettings = Field(default_factory=StrategySettings, description="how updates become versions")
    half_expires_s: float = Field(600.0, gt=0, description="seconds that half an update waits for its other half")
    away_after_s: float = Field(60.0, gt=0, description="seconds of silence after which a device is away and not waited for")
    join_wait_s: float = Field(600.0, gt=0, description="seconds after the start in which devices yet to join are waited for")


class WorkerSettings(DaemonSettings):
    """What devices and edge servers share: the model and where the federation server is."""

    federation: Address = Field("127.0.0.1:7300", description="host:port of the federation server")
    model: str = Field(min_length=1, description="folder or hub id of the pretrained model")
    task: Task = Field("classification", description="what the model is trained to do")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="the adapter's shape")
    precision: Precision = Field(
        "fp32",
        description="number format of the frozen base's weights; a device and its edge may differ (nf4 needs bitsandbytes)",
    )
    compute: Compute | None = Field(
        None, description="number format of activations and gradients; left out: fp32 for an fp32 base, bf16 for the others"
    )
    run_on: RunOn = Field("cpu", description="where the model computes")
    wait_s: float = Field(60.0, gt=0, description="seconds to wait for a peer at the start")
    give_up_s: float = Field(300.0, gt=0, description="seconds to keep trying after a peer is lost")
    join_wait_s: float = Field(600.0, gt=0, description="seconds to wait until all expected devices have joined the federation")
    threads: int = Field(0, ge=0, description="CPU threads for the model; 0: torch's default")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of what is random")

    @property
    def compute_format(self) -> Compute:
        """The number format of activations and gradients in force."""
        return compute_format(self.precision, self.compute)


class EdgeSettings(WorkerSettings):
    """An edge server."""

    provide: bool = Field(True, description="send devices that ask for it the base weights of their half, and the tokenizer")
    cache: Path | None = Field(
        None, description="folder for the halves that are provided; left out: sfl/edge in XDG_CACHE_HOME or ~/.cache"
    )
    cache_limit_mb: float = Field(
        20_000.0, gt=0, description="most MB of halves that are kept; those not used for longest are removed first"
    )

    name: Name = Field("edge", description="this daemon's name, its own in the federation")
    listen: Address = Field("127.0.0.1:7301", description="host:port to serve on")
    out: Path = Field(Path("out/edge"), description="folder for metrics.jsonl")
    lowest_cut: int = Field(1, ge=1, description="lowest cut layer that devices may use; blocks below it are not kept")
    order: Literal["arrival", "longest-tail"] = Field(
        "arrival", description="which waiting step is computed first: the one that came first, or the one with most blocks to do"
    )


class DeviceSettings(WorkerSettings):
    """A device."""

    model: str | None = Field(  # type: ignore[assignment]  # the one setting that a device may leave to its edge
        None,
        min_length=1,
        description="folder or hub id of the pretrained model; left out: the edge provides it, with task and LoRA settings",
    )
    cache: Path | None = Field(None, description="folder for a provided half; left out: sfl/device in XDG_CACHE_HOME or ~/.cache")
    cache_limit_mb: float = Field(
        4_000.0, gt=0, description="most MB of provided halves that are kept; those not used for longest are removed first"
    )

    edge: Address = Field("127.0.0.1:7301", description="host:port of the edge server")
    out: Path = Field(Path("out/device"), description="folder for metrics.jsonl")
    cut: Cut = Field(
        1, description="cut layer: number of blocks that run on the device; auto: as `sfl plan` recommends for its free memory"
    )
    tight_memory: bool | None = Field(
        None,
        description="give freed memory back to the system at once, for slower steps; left out: where less than 2000 MB are free",
    )
    data: DataSettings = Field(description="the device's own data")
    batch_size: int = Field(8, ge=1, description="examples in a step")
    micro_batch: int = Field(
        0, ge=0, description="examples that the device computes at a time; fewer take less memory, and a second forward pass"
    )
    checkpointing: bool = Field(
        False, description="keep only each block's input for the backward pass and compute the block once more then"
    )
    max_length: int = Field(64, ge=1, description="tokens after which a text is cut off")
    steps: int = Field(100, ge=1, description="local optimiser steps")
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, description="the local optimiser")
    shuffle: bool = Field(True, description="shuffle the training examples in each epoch; otherwise they keep their order")
    validation_batches: int = Field(4, ge=1, description="batches in a local validation")
    profile: bool = Field(False, description="record where memory goes and write profile.json to `out`")

    def written(self) -> dict[str, Any]:
        """As ever, without what is left to the edge server: as defaults they would contradict it."""
        left_open = {"task", "lora"} if self.model is None else set[str]()
        given = self.model_dump(mode="json", include=left_open, exclude_unset=True)
        return {**self.model_dump(mode="json", exclude_none=True, exclude=left_open), **given}
