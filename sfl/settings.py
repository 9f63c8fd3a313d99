"""What each daemon is told: one model per daemon, every setting with its meaning, default and range.

Descriptions become the help texts of the command line (`sfl.cli.load_settings`). Nothing here needs torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from sfl.adapters.layout import LoraSpec
from sfl.base_settings import Settings
from sfl.connection_settings import LimitSettings, TlsSettings
from sfl.data.settings import DataSettings, Task
from sfl.errors import SettingsError
from sfl.federation_settings import (
    MergeName,
    PrivacySettings,
    RobustSettings,
    check_together,
    fitting,
)
from sfl.federation_settings import StrategySettings as StrategySettings
from sfl.telemetry import LogFormat
from sfl.wire.address import check_address

Precision = Literal["fp32", "bf16", "int8", "nf4"]
Compute = Literal["fp32", "bf16"]
RunOn = Literal["cpu", "cuda"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR"]


def compute_format(precision: Precision, compute: Compute | None = None) -> Compute:
    """The number format of activations; where none is asked for, fp32 for an fp32 base and else bf16."""
    return compute or ("fp32" if precision == "fp32" else "bf16")


def _check_address(address: str) -> str:
    try:
        check_address(address)
    except SettingsError as error:
        raise ValueError(str(error)) from error
    return address


def _check_address_or_none(address: str) -> str:
    return address and _check_address(address)


_LONGEST_NAME = 100  # bytes, as in certificates


def _check_name(name: str) -> str:
    if not name.strip() or any(character in "/\\" or not character.isprintable() for character in name):
        raise ValueError("a name is not empty and holds no slash, backslash or control character")
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"a name has at most {_LONGEST_NAME} bytes")
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
    warmup_steps: int = Field(
        0, ge=0, description="steps over which the learning rate rises in a straight line first; fewer than the device's steps"
    )


class DaemonSettings(Settings):
    """What all three daemons are told."""

    name: Name = Field(description="this daemon's name, its own in the federation")
    out: Path = Field(description="folder for metrics.jsonl")
    log_level: LogLevel = Field("INFO", description="least severe messages that are logged")
    log_format: LogFormat = Field("text", description="form of the log: lines of text, or a JSON object a line")
    metrics_listen: Annotated[str, AfterValidator(_check_address_or_none)] = Field(
        "", description="host:port on which Prometheus finds /metrics, and anyone /healthz; left out: nowhere"
    )
    tls: TlsSettings = Field(default_factory=TlsSettings, description="this node's certificate, and what it protects")


class FedSettings(DaemonSettings):
    """The federation server."""

    name: Name = Field("fed", description="this daemon's name, its own in the federation")
    listen: Address = Field("127.0.0.1:7300", description="host:port to serve on")
    out: Path = Field(Path("out/fed"), description="folder for metrics.jsonl, the pool of updates, the ledger and the roster")
    adapters: Path | None = Field(None, description="folder for the versions of the adapter; by default adapters inside out")
    keep_versions: int = Field(
        20,
        ge=0,
        description="newest versions of the adapter that are kept, beside version 0 and those that devices still train on or that"
        " updates in the pool stem from; 0: all",
    )
    devices: int = Field(ge=1, description="number of devices that take part")
    labels: Annotated[tuple[str, ...], AfterValidator(_distinct)] = Field(
        (), description="labels fixed beforehand; empty: all that the devices have seen"
    )
    merge: MergeName = Field("average", description="how the LoRA factors of several devices become one adapter")
    robust: RobustSettings = Field(default_factory=RobustSettings, description="what attackers among the devices cannot do")
    privacy: PrivacySettings = Field(default_factory=PrivacySettings, description="differential privacy of updates")
    strategy: StrategySettings = Field(  # after those by which its defaults go
        default_factory=StrategySettings, validate_default=True, description="how updates become versions"
    )
    limits: LimitSettings = Field(default_factory=LimitSettings, description="what one node may take of this server")
    half_expires_s: float = Field(600.0, gt=0, description="seconds that half an update waits for its other half")
    away_after_s: float = Field(60.0, gt=0, description="seconds of silence after which a device is away and not waited for")
    join_wait_s: float = Field(600.0, gt=0, description="seconds after the start in which devices yet to join are waited for")

    @field_validator("strategy")
    @classmethod
    def _fit(cls, strategy: StrategySettings, info: ValidationInfo) -> StrategySettings:
        privacy = info.data.get("privacy")
        return fitting(strategy, info.data.get("merge", "average"), privacy is not None and privacy.on)

    @model_validator(mode="after")
    def _check(self) -> FedSettings:
        check_together(self.strategy, self.merge, self.robust, self.privacy)
        return self


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
    report_s: float = Field(
        10.0, ge=0, description="seconds between two reports to the federation server, for `sfl status`; 0: none are sent"
    )
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
    session_keep_s: float = Field(
        86_400.0, gt=0, description="seconds that the state of a device that has gone is kept on disk for its return"
    )
    order: Literal["arrival", "longest-tail"] = Field(
        "arrival", description="which waiting step is computed first: the one that came first, or the one with most blocks to do"
    )
    limits: LimitSettings = Field(default_factory=LimitSettings, description="what one node may take of this server")


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
    rank: int | None = Field(None, ge=1, description="rank of this device's LoRA factors, at most lora.rank; left out: lora.rank")
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
    checkpoint_steps: int = Field(
        20, ge=0, description="steps after which device and edge keep their state; 0: only with submissions and adoptions"
    )
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, description="the local optimiser")
    shuffle: bool = Field(True, description="shuffle the training examples in each epoch; otherwise they keep their order")
    validation_batches: int = Field(4, ge=1, description="batches in a local validation")
    label_counts: bool = Field(
        True,
        description="tell the federation server how many training examples have each label, for strategy.logit_adjustment there",
    )
    profile: bool = Field(False, description="record where memory goes and write profile.json to `out`")

    @model_validator(mode="after")
    def _check_warmup(self) -> DeviceSettings:
        warmup = self.optimizer.warmup_steps
        if warmup >= self.steps:
            raise ValueError(f"optimizer.warmup_steps {warmup} must be fewer than the device's {self.steps} steps")
        return self

    def written(self) -> dict[str, Any]:
        """As ever, without what is left to the edge server: as defaults they would contradict it."""
        left_open = {"task", "lora"} if self.model is None else set[str]()
        given = self.model_dump(mode="json", include=left_open, exclude_unset=True)
        return {**self.model_dump(mode="json", exclude_none=True, exclude=left_open), **given}
