"""`sfl profile`: where each megabyte of a device half, or of a running process, goes."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sfl.cli.daemons import rest_between_steps
from sfl.errors import SettingsError
from sfl.model.lean_imports import lean_imports
from sfl.phases import phase

if TYPE_CHECKING:
    from sfl.profiling.result import Profile

_MATPLOTLIB = "matplotlib, which is not installed: pip install '.[demo]' in sfl's folder"


def profile(
    model: Annotated[str | None, typer.Option(help="model folder or hub id; by default the pretrained all-MiniLM-L6-v2")] = None,
    cut: Annotated[int, typer.Option(min=1, help="cut layer: number of blocks on the device")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="examples in a step")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="tokens of each example")] = 64,
    precision: Annotated[
        Literal["fp32", "bf16", "int8", "nf4"], typer.Option(help="number format of the base model's weights")
    ] = "fp32",
    compute: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="number format of activations; by default fp32 for an fp32 base, else bf16"),
    ] = None,
    run_on: Annotated[Literal["cpu", "cuda"], typer.Option(help="where the model computes")] = "cpu",
    micro_batch: Annotated[int, typer.Option(min=0, help="examples computed at a time; 0: the whole batch")] = 0,
    checkpointing: Annotated[bool, typer.Option(help="keep only each block's input for the backward pass")] = False,
    steps: Annotated[int, typer.Option(min=1, help="optimiser steps")] = 5,
    rank: Annotated[int, typer.Option(min=1, help="rank of the adapter")] = 8,
    targets: Annotated[str, typer.Option(help="modules with LoRA, comma-separated; by default peft's for the family")] = "",
    task: Annotated[
        Literal["classification", "causal-lm"], typer.Option(help="what the model is trained to do")
    ] = "classification",
    threads: Annotated[int, typer.Option(min=0, help="CPU threads for the model; 0: torch's default")] = 0,
    pid: Annotated[int | None, typer.Option(help="look at this running process instead")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="how long to look at --pid")] = 10.0,
    read: Annotated[Path | None, typer.Option(help="show this profile.json instead")] = None,
    memory: Annotated[float | None, typer.Option(min=1, help="MB that there are; by default the container's limit")] = None,
    json: Annotated[str | None, typer.Option(help="write the profile to this file as JSON; -: print it, and no table")] = None,
    png: Annotated[Path | None, typer.Option(help="draw the timeline and the parts to this file")] = None,
    out: Annotated[Path | None, typer.Option(help="folder for profile.json and profile.png")] = None,
) -> None:
    """Show where each megabyte goes: of a device half that trains in this process, or of a running one."""
    if sum(option is not None for option in (model, pid, read)) > 1:
        raise SettingsError("give one of --model, --pid and --read")
    _require_folders(Path(json) if json not in (None, "-") else None, png)
    if png is not None and not _drawable():
        raise SettingsError(f"--png needs {_MATPLOTLIB}")
    if read is not None:
        from sfl.profiling.result import read_profile

        found = read_profile(read)
    elif pid is not None:
        from sfl.profiling.outside import look_at

        found = look_at(pid, seconds, memory)
    else:
        settings = {
            "cut": cut,
            "batch_size": batch_size,
            "max_length": max_length,
            "precision": precision,
            "compute": compute,
            "run_on": run_on,
            "micro_batch": micro_batch,
            "checkpointing": checkpointing,
            "steps": steps,
            "task": task,
            "threads": threads,
            "lora": {"rank": rank, "alpha": 2 * rank, "target_modules": tuple(filter(None, targets.split(",")))},
        }
        found = _device_half(model, settings, memory)
    _show(found, json, png, out)


def _device_half(model: str | None, options: Mapping[str, Any], memory: float | None) -> Profile:
    from sfl.data.settings import DataSettings
    from sfl.model.default import default_model
    from sfl.profiling.board.energy import energy_meter
    from sfl.profiling.recorder import Recorder
    from sfl.settings import DeviceSettings
    from sfl.telemetry import configure_logging

    configure_logging("WARNING")
    rest_between_steps()
    settings = DeviceSettings(
        name="profile",
        model=model or str(default_model(options["task"])),
        data=DataSettings(path=Path("none")),
        **options,
    )
    recorder = Recorder(energy_meter())
    with recorder.recording():
        with phase("import"):
            lean_imports()
            import_module("sfl.device.daemon")  # all that a device imports, and little more
            device = import_module("sfl.profiling.device")
        device.run_steps(settings, recorder)
    from sfl.profiling.summary import described, summarise

    return summarise(recorder, described(settings), memory)


def _drawable() -> bool:
    return find_spec("matplotlib") is not None


def _require_folders(*files: Path | None) -> None:
    """What cannot be written is said before minutes of measuring."""
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise SettingsError(f"there is no folder '{file.parent}' for '{file.name}'")


def _show(found: Profile, json: str | None, png: Path | None, out: Path | None) -> None:
    from sfl.profiling.result import write_profile

    files = [Path(json)] if json not in (None, "-") else []
    pictures = [png] if png is not None else []
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        files.append(out / "profile.json")
        if _drawable():
            pictures.append(out / "profile.png")
        else:
            typer.echo(f"profile.png is left out: it needs {_MATPLOTLIB}", err=True)
    for file in files:
        write_profile(file, found)
    for picture in pictures:
        from sfl.profiling.picture import draw

        draw(picture, found)
    if json == "-":
        typer.echo(found.to_json(), nl=False)
        return
    from rich.console import Console

    from sfl.profiling.table import tables

    screen = Console()
    if not screen.is_terminal:
        screen.width = 140
    screen.print(tables(found), highlight=False)
    for what in (*files, *pictures):
        screen.print(f"written: {what}", highlight=False, soft_wrap=True)
