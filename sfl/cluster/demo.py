"""What `sfl demo` was asked for, as a plan."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from sfl.cluster.output import prepare_output
from sfl.cluster.plan import Plan, share_data, share_threads
from sfl.data.generate import PROFILES, generate_log
from sfl.data.settings import Task
from sfl.errors import DataFileError, SettingsError
from sfl.model.default import DEFAULT_NAME, default_model
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings, LoraSettings, OptimizerSettings, Precision, StrategySettings
from sfl.telemetry import log

GENERATED_FLOWS = 1500  # of each device, when no data is given
_FLAGS = {  # those that are not called as their setting
    ("StrategySettings", "name"): "--strategy",
    ("OptimizerSettings", "name"): "--optimizer",
    ("OptimizerSettings", "learning_rate"): "--lr",
    ("LoraSettings", "rank"): "--lora-rank",
    ("DataSettings", "partition_seed"): "--seed",
}
_SHOWN = 3  # files of a folder that are named where files are wanted


@dataclass(frozen=True)
class DemoOptions:
    """The flags of `sfl demo`; `devices` is None for one a data file, or for 3 where there is none.

    `cuts` are cycled over the devices. `model` is None for the pretrained all-MiniLM-L6-v2.
    """

    model: str | None = None
    task: Task = "classification"
    data: tuple[Path, ...] = ()
    text_columns: tuple[str, ...] = ("text",)
    devices: int | None = None
    cuts: tuple[int, ...] = (2,)
    steps: int = 80
    batch_size: int = 8
    max_length: int = 64
    lora_rank: int = 8
    learning_rate: float = 3e-3
    optimizer: str = "adamw"
    strategy: str = "gsfs"
    shuffle: bool = True
    seed: int = 0
    precision: Precision = "fp32"
    edges: int = 1
    out: Path = Path("out/demo")

    @property
    def title(self) -> str:
        """Strategy and model in words, for the picture."""
        return f"{self.strategy} on {DEFAULT_NAME if self.model is None else Path(self.model).name or self.model}"


def plan_demo(options: DemoOptions, tell: Callable[[str], object] = log.warning) -> Plan:
    """Prepare the output folder, generate data where none is given, and lay out the daemons; `tell` hears that an earlier run in
    that folder is replaced.

    Raises `SettingsError`, `ModelError` or `DataError` for flags that cannot be, before an earlier run in that folder is deleted.
    What is in the data, and how deep the model can be cut, is not looked at here.
    """
    model = options.model or str(default_model(options.task))
    for path in options.data:
        if path.is_dir():
            raise DataFileError(f"{path} is a folder: give each of its files with a --data of its own{_files_in(path)}")
        if not path.is_file():
            raise DataFileError(f"there is no data file {path}")
    if options.edges > (options.devices or len(options.data) or len(PROFILES)):
        raise SettingsError(f"{options.edges} edges for fewer devices: an edge without a device has nothing to do")
    placed = list(options.data) or [options.out / "data" / f"{name}.log" for name in _generated_names(options.devices)]
    try:
        plan = _lay_out(options, model, placed)
    except ValidationError as error:
        raise SettingsError(_wrong(error)) from None
    prepare_output(options.out, [*options.data, Path(model)], tell)
    if not options.data:
        _generate(placed, options.seed)
    return plan


def _lay_out(options: DemoOptions, model: str, placed: Sequence[Path]) -> Plan:
    """The daemons' settings. Raises `ValidationError` for those that cannot be."""
    data = share_data(placed, options.devices, options.seed, options.text_columns)
    device_threads, edge_threads = share_threads(len(data), options.edges)
    lora = LoraSettings(rank=options.lora_rank, alpha=2.0 * options.lora_rank)
    cuts = [options.cuts[index % len(options.cuts)] for index in range(len(data))]
    common = {"model": model, "task": options.task, "lora": lora, "precision": options.precision, "seed": options.seed}
    return Plan(
        out=options.out,
        fed=FedSettings(devices=len(data), strategy=StrategySettings.model_validate({"name": options.strategy})),
        edges=tuple(
            EdgeSettings.model_validate(
                {
                    **common,
                    "name": f"edge-{index + 1}",
                    "lowest_cut": min(cuts[index :: options.edges]),
                    "threads": edge_threads,
                }
            )
            for index in range(options.edges)
        ),
        devices=tuple(
            DeviceSettings.model_validate(
                {
                    **common,
                    "name": f"device-{index + 1}",
                    "cut": cuts[index],
                    "data": share,
                    "batch_size": options.batch_size,
                    "max_length": options.max_length,
                    "steps": options.steps,
                    "optimizer": OptimizerSettings.model_validate(
                        {"name": options.optimizer, "learning_rate": options.learning_rate}
                    ),
                    "shuffle": options.shuffle,
                    "threads": device_threads,
                }
            )
            for index, share in enumerate(data)
        ),
    )


def parse_cuts(text: str) -> tuple[int, ...]:
    """`"2"` or `"1,2,3"` as numbers. Raises `SettingsError` for anything else."""
    try:
        cuts = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingsError(f"--cut is '{text}': expected one number of blocks, or several with commas, as in 1,2,3") from None
    if min(cuts) < 1:
        raise SettingsError(f"--cut is '{text}': at least one block stays on a device")
    return cuts


def _wrong(error: ValidationError) -> str:
    """The first thing that is wrong, with the flag that it was given by."""
    first = error.errors(include_url=False)[0]
    message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if not first["loc"]:
        return message
    setting = str(first["loc"][-1])
    return f"{_FLAGS.get((error.title, setting), '--' + setting.replace('_', '-'))} is {first['input']!r}: {message}"


def _files_in(folder: Path) -> str:
    """The first files of `folder` as flags, in words."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    flags = " ".join(f"--data {shlex.quote(str(path))}" for path in files[:_SHOWN])
    return f", as in {flags}{' ...' if files[_SHOWN:] else ''}" if files else ""


def _generated_names(devices: int | None) -> list[str]:
    """One log a device, its profile's name and number: camera-1, hub-1, lock-1, camera-2, ..."""
    profiles = list(PROFILES)
    return [f"{profiles[i % len(profiles)]}-{i // len(profiles) + 1}" for i in range(devices or len(profiles))]


def _generate(paths: list[Path], seed: int) -> None:
    for index, path in enumerate(paths):
        generate_log(path, GENERATED_FLOWS, PROFILES[path.stem.rpartition("-")[0]], seed=1000 * seed + index)
