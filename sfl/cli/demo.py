"""`sfl demo`: the whole system on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def demo(
    model: Annotated[str | None, typer.Option(help="model folder or hub id; by default the pretrained all-MiniLM-L6-v2")] = None,
    task: Annotated[
        Literal["classification", "causal-lm"], typer.Option(help="what the model is trained to do")
    ] = "classification",
    data: Annotated[list[Path] | None, typer.Option(help="a device's data; repeat it for more; by default made-up flows")] = None,
    text_column: Annotated[
        list[str] | None, typer.Option(help="column or JSON field of the text; repeat it to join several")
    ] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="number of devices; by default one a data file, or 3")] = None,
    cut: Annotated[str, typer.Option(help="blocks on a device, K[,K...], in turn")] = "2",
    steps: Annotated[int, typer.Option(min=1, help="local optimiser steps of each device")] = 80,
    batch_size: Annotated[int, typer.Option(min=1, help="examples in a step")] = 8,
    max_length: Annotated[int, typer.Option(min=1, help="tokens after which a text is cut off")] = 64,
    lora_rank: Annotated[int, typer.Option(min=1, help="rank of the adapter; alpha is twice as much")] = 8,
    lr: Annotated[float, typer.Option(min=0, help="learning rate")] = 3e-3,
    optimizer: Annotated[Literal["adamw", "sgd"], typer.Option(help="local optimiser")] = "adamw",
    strategy: Annotated[str, typer.Option(help="gsfs, gsfs-printed, fedavg or another of `sfl fed`")] = "gsfs",
    shuffle: Annotated[bool, typer.Option(help="shuffle each device's training examples")] = True,
    seed: Annotated[int, typer.Option(min=0, help="seed of all that is random")] = 0,
    precision: Annotated[
        Literal["fp32", "bf16", "int8", "nf4"], typer.Option(help="number format of the base model's weights")
    ] = "fp32",
    edges: Annotated[int, typer.Option(min=1, help="number of edge servers")] = 1,
    out: Annotated[
        Path, typer.Option(help="folder for logs, metrics, adapters, summary and picture; an earlier run in it is replaced")
    ] = Path("out/demo"),
    json: Annotated[bool, typer.Option("--json", help="print summary.json instead of the table")] = False,
) -> None:
    """Run devices, edge servers and the federation server as local processes, and show what was learnt."""
    from rich.console import Console

    from sfl.cluster.demo import DemoOptions, parse_cuts, plan_demo
    from sfl.cluster.report import summary_table
    from sfl.cluster.run import run_plan
    from sfl.telemetry import configure_logging

    configure_logging("WARNING")
    options = DemoOptions(
        model=model,
        task=task,
        data=tuple(data or ()),
        text_columns=tuple(text_column or ("text",)),
        devices=devices,
        cuts=parse_cuts(cut),
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        lora_rank=lora_rank,
        learning_rate=lr,
        optimizer=optimizer,
        strategy=strategy,
        shuffle=shuffle,
        seed=seed,
        precision=precision,
        edges=edges,
        out=out,
    )
    progress = Console(stderr=True)
    plan = plan_demo(options, lambda line: progress.print(line, highlight=False, soft_wrap=True))
    progress.print(
        f"devices: {len(plan.devices)}, edge servers: {len(plan.edges)}; logs in {out}/*/log.txt",
        highlight=False,
        soft_wrap=True,
    )
    try:
        summary = run_plan(plan, progress, options.title)
    except KeyboardInterrupt:
        progress.print("interrupted: all daemons were stopped")
        raise
    if json:
        typer.echo((out / "summary.json").read_text(encoding="utf-8"), nl=False)
        return
    screen = Console()
    if not screen.is_terminal:
        screen.width = 140  # a file or a pipe has room for the whole table
    screen.print(summary_table(summary))
    for what, where in (("adapter", summary["adapter"]), ("picture", out / "loss.png"), ("figures", out / "summary.json")):
        screen.print(f"{what}: {where}", highlight=False, soft_wrap=True)
