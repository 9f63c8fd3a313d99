"""`sfl eval`: an adapter on data, with the uncut model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def evaluate(
    adapter: Annotated[Path, typer.Option(help="folder of the adapter, such as the one that `sfl demo` names at its end")],
    data: Annotated[list[Path], typer.Option(help="data file; repeat it for more")],
    model: Annotated[
        str | None,
        typer.Option(help="folder or hub id of the model that the adapter was trained on; by default its own note of it"),
    ] = None,
    skip_unknown: Annotated[
        bool, typer.Option("--skip-unknown", help="leave out examples with a label that the adapter was not trained on")
    ] = False,
    split: Annotated[
        Literal["all", "test"],
        typer.Option(help="all examples, or those that a device with this file and the default split keeps for the test"),
    ] = "all",
    keep_repeats: Annotated[
        bool, typer.Option("--keep-repeats", help="count examples of the same content and label each time")
    ] = False,
    text_column: Annotated[
        list[str] | None, typer.Option(help="column or JSON field of the text; repeat it to join several")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="column or JSON field of the label")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="examples at a time")] = 32,
    json: Annotated[bool, typer.Option("--json", help="print one JSON object instead of a table")] = False,
) -> None:
    """Loss, accuracy and macro-F1 of an adapter. Labels, columns and text length are the adapter's own."""
    from json import dumps

    from rich.console import Console
    from rich.table import Table

    from sfl.adapters.peft_format import read_layout
    from sfl.data.settings import DataSettings
    from sfl.evaluate import evaluate as evaluate_adapter
    from sfl.evaluate import examples_for
    from sfl.telemetry import configure_logging

    configure_logging("WARNING")
    columns = {"text_columns": tuple(text_column)} if text_column else {}
    settings = [
        DataSettings.model_validate({"path": path, "drop_repeats": not keep_repeats, "label_column": label_column, **columns})
        for path in data
    ]
    layout = read_layout(adapter)
    examples = examples_for(layout, settings, split)
    if skip_unknown and layout.labels:
        known = [example for example in examples if example.label in layout.labels]
        if len(known) < len(examples):
            typer.echo(f"left out {len(examples) - len(known)} of {len(examples)} examples with an unknown label", err=True)
        examples = known
    result = evaluate_adapter(model or layout.base_model, adapter, examples, batch_size=batch_size)
    seen = sum(each.count > 0 for each in result.classes or ())
    if result.classes is not None and seen < len(result.classes):
        what = "macro-F1 leaves out those that are neither there nor predicted"
        typer.echo(f"labels in the data: only {seen} of the {len(result.classes)} that the model knows; {what}", err=True)
    if json:
        typer.echo(dumps(result.as_dict(), indent=2))
        return
    screen = Console()
    screen.print(f"loss {result.loss:.4f} over {result.count} {'examples' if result.classes else 'tokens'}", highlight=False)
    if result.classes is not None:
        screen.print(f"accuracy {result.accuracy:.4f}, macro-F1 {result.f1_macro:.4f}", highlight=False)
        table = Table("class", "examples", "F1", header_style="bold")
        for each in result.classes:
            table.add_row(each.label, str(each.count), f"{each.f1:.3f}" if each.count else "-")
        screen.print(table)
