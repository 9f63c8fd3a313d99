"""`sfl plan`: which cut fits."""

from __future__ import annotations

from dataclasses import replace
from json import dumps
from typing import Annotated, Literal

import typer

from sfl.cli.daemons import rest_between_steps


def plan(
    model: Annotated[
        str | None, typer.Option(help="folder with a config.json, or hub id; by default the pretrained all-MiniLM-L6-v2")
    ] = None,
    memory: Annotated[float | None, typer.Option(min=1, help="MB that the device has; by default what is free here")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="examples in a step")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="tokens of each example")] = 64,
    micro_batch: Annotated[int, typer.Option(min=0, help="examples computed at a time; 0: the whole batch")] = 0,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="keep only each block's input for the backward pass")
    ] = False,
    precision: Annotated[
        Literal["fp32", "bf16", "int8", "nf4", "all"], typer.Option(help="number format of the device's base weights")
    ] = "fp32",
    compute: Annotated[
        Literal["fp32", "bf16"] | None,
        typer.Option(help="number format of activations; by default fp32 for an fp32 base, else bf16"),
    ] = None,
    rank: Annotated[int, typer.Option(min=1, help="rank of the adapter")] = 8,
    targets: Annotated[str, typer.Option(help="modules with LoRA, comma-separated; by default peft's for the family")] = "",
    optimizer: Annotated[Literal["adamw", "sgd"], typer.Option(help="optimiser of the adapter")] = "adamw",
    task: Annotated[
        Literal["classification", "causal-lm"], typer.Option(help="what the model is trained to do")
    ] = "classification",
    classes: Annotated[int, typer.Option(min=2, help="labels of a classification")] = 2,
    devices: Annotated[int, typer.Option(min=1, help="devices that share the edge")] = 1,
    edge_precision: Annotated[
        Literal["fp32", "bf16", "int8", "nf4"] | None, typer.Option(help="number format at the edge; by default the device's")
    ] = None,
    lowest_cut: Annotated[int, typer.Option(min=1, help="the edge's lowest cut")] = 1,
    device_gflops: Annotated[
        float | None, typer.Option(help="10^9 operations a second of the device; by default as --calibrate measured them")
    ] = None,
    edge_gflops: Annotated[float | None, typer.Option(help="the same of the edge")] = None,
    bandwidth_mbit: Annotated[float | None, typer.Option(help="Mbit/s of the link, each way")] = None,
    rtt_ms: Annotated[float | None, typer.Option(help="round trip of the link in ms")] = None,
    calibrate: Annotated[bool, typer.Option("--calibrate", help="first measure this machine, once for all plans")] = False,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Predict for every cut what a device and its edge need, and recommend one. Reads a configuration, no weights."""
    from sfl.telemetry import configure_logging

    configure_logging("WARNING")
    rest_between_steps()
    from sfl.model.default import default_model
    from sfl.model.lean_imports import lean_imports
    from sfl.planning.available import available_memory
    from sfl.planning.calibration import PRECISIONS, write_calibration

    lean_imports()
    if calibrate:
        from sfl.planning.measure import measure_machine

        kept = write_calibration(measure_machine(tell=lambda what: typer.echo(what, err=True)))
        typer.echo(f"calibration written to {kept}", err=True)
        if model is None:
            return
    from sfl.adapters.layout import LoraSpec
    from sfl.model.load import load_config
    from sfl.planning.plan import make_plan
    from sfl.planning.report import Report
    from sfl.planning.request import PlanRequest

    name = model or str(default_model(task))
    config = load_config(name)
    request = PlanRequest(
        task=task,
        batch_size=batch_size,
        max_length=max_length,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        compute=compute,
        lora=LoraSpec(rank, 2.0 * rank, 0.0, tuple(filter(None, targets.split(",")))),
        optimizer=optimizer,
        devices=devices,
        edge_precision=edge_precision,
        lowest_cut=lowest_cut,
        classes=classes,
        device_gflops=device_gflops,
        edge_gflops=edge_gflops,
        bandwidth_mbit=bandwidth_mbit,
        rtt_ms=rtt_ms,
    )
    wanted = PRECISIONS if precision == "all" else (precision,)
    plans = [make_plan(config, replace(request, precision=each)) for each in wanted]
    report = Report(name, plans, available_memory() if memory is None else memory, memory is not None)
    if json:
        typer.echo(dumps(report.as_dict(), indent=2))
        return
    from rich.console import Console

    screen = Console()
    if not screen.is_terminal:
        screen.width = 140
    for part in report.shown():
        screen.print(part, highlight=False, soft_wrap=isinstance(part, str))
