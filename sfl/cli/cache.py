"""`sfl cache`: the halves of models that devices were provided with and edge servers have packed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sfl.cache.cache import Entry, HalfCache, default_folder
from sfl.cache.edges import KnownEdges
from sfl.errors import SettingsError
from sfl.telemetry import counted

app = typer.Typer(no_args_is_help=True, help="List or clear the halves of models that are kept on this machine's disk.")

Folder = Annotated[
    Path | None, typer.Option("--cache", help="the folder; by default those of devices and of edge servers")
]  # as in the settings


@app.command("list")
def list_(
    cache: Folder = None,
    json: Annotated[bool, typer.Option("--json", help="print one JSON array instead of a table")] = False,
) -> None:
    """What is kept, the least recently used first."""
    from json import dumps

    from rich.console import Console
    from rich.table import Table

    rows = [_row(place, entry) for place in _places(cache) for entry in place.entries()]
    if json:
        typer.echo(dumps(rows, indent=2))
        return
    screen = Console()
    if not screen.is_terminal:
        screen.width = 200
    table = Table("folder", "model", "source", "cut", "precision", "MB", "last used", "state", header_style="bold")
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used"]))
        known = (row["folder"], row["model"] or "-", row["source"][:12], str(row["cut"]), row["precision"])
        table.add_row(*known, f"{row['bytes'] / 1e6:.1f}", used, row["state"])
    screen.print(table)
    screen.print(f"{counted(len(rows), 'half', 'halves')}, {sum(row['bytes'] for row in rows) / 1e6:.1f} MB", highlight=False)


@app.command()
def clear(
    source: Annotated[
        str | None, typer.Argument(help="what the halves were packed from, as `list` shows it, or how it begins")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="clear everything")] = False,
    edge: Annotated[
        str | None, typer.Option(help="HOST:PORT of an edge server: forget which model it provided, and clear that model")
    ] = None,
    cache: Folder = None,
) -> None:
    """Delete halves, of one model or of all. What a running device or edge server uses stays, and is named."""
    if sum([source is not None, every, edge is not None]) != 1:
        raise SettingsError("say what to clear: a SOURCE (`sfl cache list` shows them), --edge HOST:PORT or --all")
    removed: list[Entry] = []
    stayed = 0
    for place in _places(cache):
        for entry in _chosen(place, source, edge):
            if place.in_use(entry.key) or not place.remove(entry):
                typer.echo(f"{place.folder}: {entry.key} is in use and stays", err=True)
                stayed += 1
            else:
                removed.append(entry)
        if every:
            _forget_what_is_gone(place)
    if not removed and not stayed and source is not None:
        raise SettingsError(f"nothing was cleared: no half in the cache is of {source}; see `sfl cache list`")
    typer.echo(f"cleared {counted(len(removed), 'half', 'halves')}, {sum(entry.size for entry in removed) / 1e6:.1f} MB")


def _places(cache: Path | None) -> list[HalfCache]:
    folders = [default_folder("device"), default_folder("edge")] if cache is None else [cache]
    return [HalfCache(folder, 0) for folder in folders]


def _row(place: HalfCache, entry: Entry) -> dict[str, Any]:
    names = {known.source: known.base_model for known in KnownEdges(place.folder).all().values()}
    return {
        "folder": str(place.folder),
        "model": names.get(entry.key.source),
        "source": entry.key.source,
        "cut": entry.key.cut,
        "precision": entry.key.precision,
        "bytes": entry.size,
        "used": entry.used,
        "state": ("complete" if entry.complete else "broken off") + (", in use" if place.in_use(entry.key) else ""),
    }


def _chosen(place: HalfCache, source: str | None, edge: str | None) -> list[Entry]:
    """What is to be cleared of one cache: a source, what `edge` provided, which is forgotten, or everything."""
    known = KnownEdges(place.folder)
    if edge is not None:
        provided = known.all().get(edge)
        if provided is None:
            return []
        known.forget(edge)
        if provided.source in {other.source for other in known.all().values()}:
            return []  # another edge server provides it, too
        source = provided.source
    return [entry for entry in place.entries() if entry.key.source.startswith(source or "")]


def _forget_what_is_gone(place: HalfCache) -> None:
    """Forget the edge servers that provided a model of which no half is left."""
    known, kept = KnownEdges(place.folder), {entry.key.source for entry in place.entries()}
    for address, provided in known.all().items():
        if provided.source not in kept:
            known.forget(address)
