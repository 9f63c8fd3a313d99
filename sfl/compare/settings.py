"""What `sfl compare` is told: what all runs share, and what a `[[run]]` table may change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from sfl.base_settings import Settings
from sfl.data.settings import DataSettings, Format
from sfl.settings import LoraSettings, OptimizerSettings, Precision, RunOn

AttackKind = Literal["sign-flip", "scaling", "gaussian", "label-flip", "backdoor"]


def _table(given: Any) -> Any:
    """A table as a flag or a variable has it, `a.b=1,c=x`; values as far as they are numbers or switches are read by pydantic."""
    if not isinstance(given, str):
        return given
    tree: dict[str, Any] = {}
    for entry in filter(None, (part.strip() for part in given.split(","))):
        name, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"'{entry}' is no NAME=VALUE")
        *tables, last = name.strip().split(".")
        branch = tree
        for table in tables:
            branch = branch.setdefault(table, {})
        branch[last] = value.strip()
    return tree


def _of_a_device(name: str) -> Any:
    """The field `name` of a device's data settings, to be had here, too."""
    return copy.deepcopy(DataSettings.model_fields[name])


Table = Annotated[dict[str, Any], BeforeValidator(_table)]


class ReadingSettings(Settings):
    """How the data are read and split: the same on all devices."""

    format: Format = _of_a_device("format")
    columns: tuple[str, ...] = _of_a_device("columns")
    text_columns: tuple[str, ...] = _of_a_device("text_columns")
    label_column: str | None = _of_a_device("label_column")
    drop_repeats: bool = _of_a_device("drop_repeats")
    split: Literal["hash", "time"] = _of_a_device("split")
    validation: float = _of_a_device("validation")
    test: float = _of_a_device("test")
    max_examples: int | None = _of_a_device("max_examples")


class AttackSettings(Settings):
    """Attackers among the devices."""

    kind: AttackKind | None = Field(
        None,
        description="what attackers do, to their updates (sign-flip, scaling, gaussian) or their examples (label-flip, backdoor)",
    )
    devices: int = Field(0, ge=0, description="number of attackers, drawn by the seed")
    names: tuple[str, ...] = Field((), description="which devices attack, instead of a number of them")
    strength: float | None = Field(
        None,
        gt=0,
        description="factor on an attacker's update, for gaussian on the noise in its place, which has the update's root mean"
        " square; by default 10 with scaling and gaussian, else 1",
    )
    halves: Literal["both", "device"] = Field(
        "both", description="which halves of its updates an attacker can change: both, as if its edge helped, or its own"
    )
    poisoned: float = Field(0.5, gt=0, le=1, description="share of an attacker's training examples with the trigger (backdoor)")
    trigger: str = Field("cf mn bb", min_length=1, description="words that are appended to a text (backdoor)")
    target: str | None = Field(None, description="label that the trigger is to give; by default the most frequent one (backdoor)")


class RunSettings(Settings):
    """What a [[run]] table may change: all of this, and the federation server's own strategy, merge, robust and privacy."""

    cuts: tuple[int, ...] = Field((2,), min_length=1, description="blocks on a device; several are taken in turn")
    ranks: tuple[int, ...] = Field((), description="rank of a device's LoRA factors; several are taken in turn; empty: lora.rank")
    lora: LoraSettings = Field(default_factory=LoraSettings, description="the adapter's shape")
    steps: int = Field(100, ge=1, description="local steps of each device")
    batch_size: int = Field(8, ge=1, description="examples in a step")
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings, description="the local optimiser")
    precision: Precision = Field(
        "fp32", description="number format of the base's weights in training; figures are of an fp32 base"
    )
    attack: AttackSettings = Field(default_factory=AttackSettings, description="attackers among the devices")
    step_ms: tuple[float, ...] = Field(
        (100.0,),
        min_length=1,
        description="simulated milliseconds of a device's step, a third of which a batch of a local validation takes; several are"
        " taken in turn",
    )
    mbit_s: tuple[float, ...] = Field(
        (), description="simulated Mbit/s between a device and the federation server; several are taken in turn; empty: no limit"
    )
    round_trip_ms: tuple[float, ...] = Field(
        (), description="simulated round trip of that link; several are taken in turn; empty: none"
    )
    device: Table = Field({}, description="other settings of all devices, as in `sfl device --help`, NAME=VALUE,...")
    fed: Table = Field({}, description="settings of the federation server in all runs, NAME=VALUE,..., as strategy.local_steps=5")


class CompareSettings(RunSettings):
    """A comparison: each strategy with each merge, and each [[run]] of the file, for every seed, on one data set."""

    data: Path = Field(description="folder of files, one device each, or one file for several devices")
    devices: int | None = Field(None, ge=1, description="number of devices that share the one file")
    alpha: float | None = Field(
        None, gt=0, description="Dirichlet concentration of the labels on these devices, less is more uneven; left out: evenly"
    )
    reading: ReadingSettings = Field(default_factory=ReadingSettings, description="how the data are read and split")
    model: str | None = Field(None, description="model folder or hub id; by default the pretrained all-MiniLM-L6-v2")
    max_length: int = Field(64, ge=1, description="tokens after which a text is cut off")
    strategies: tuple[str, ...] = Field(
        (), description="strategies, and centralised; by default centralised,fedavg,gsfs, or with [[run]] tables none"
    )
    merges: tuple[str, ...] = Field((), description="merges for each strategy; by default that of the federation server")
    run: tuple[dict[str, Any], ...] = Field((), description="in a file: [[run]] tables, each with a name and what it changes")
    seeds: int = Field(
        3, ge=1, description="number of seeds; each decides the division of a file, batches, adapter and attackers"
    )
    first_seed: int = Field(0, ge=0, description="the first of them")
    curve_points: int = Field(12, ge=0, description="versions of a run that are evaluated on the way to its last")
    target: float | None = Field(
        None, gt=0, le=1, description="accuracy; the table then says what the first evaluated version that reached it had taken"
    )
    latency_texts: int = Field(50, ge=1, description="texts that are classified one by one, to time them")
    run_on: RunOn = Field("cpu", description="where the model computes")
    threads: int = Field(0, ge=0, description="CPU threads; 0: torch's default")
    keep: bool = Field(False, description="keep each run's adapters and metrics beside its figures")
    out: Path = Field(
        Path("out/compare"), description="folder for figures, tables and pictures; finished runs there are not run again"
    )
