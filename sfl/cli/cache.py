"""`sfl cache`: the halves of models that devices were provided with and edge servers have packed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sfl.cache.cache import Entry, HalfCache, default_folder
from sfl.cache.edges import KnownEdges
from sfl.errors import SettingsError

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
    table = Table("folder", "model", "fingerprint", "cut", "precision", "MB", "last used", "state", header_style="bold")
    for row in rows:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(row["used"]))
        known = (row["folder"], row["model"] or "-", row["fingerprint"][:12], str(row["cut"]), row["precision"])
        table.add_row(*known, f"{row['bytes'] / 1e6:.1f}", used, row["state"])
    screen.print(table)
    screen.print(f"{len(rows)} halves, {sum(row['bytes'] for row in rows) / 1e6:.1f} MB", highlight=False)


@app.command()
def clear(
    fingerprint: Annotated[str | None, typer.Argument(help="fingerprint of a model, or how it begins")] = None,
    every: Annotated[bool, typer.Option("--all", help="clear everything")] = False,
    edge: Annotated[
        str | None, typer.Option(help="HOST:PORT of an edge server: forget which model it provided, and clear that model")
    ] = None,
    cache: Folder = None,
) -> None:
    """Delete halves, of one model or of all. What a running device uses stays."""
    if sum([fingerprint is not None, every, edge is not None]) != 1:
        raise SettingsError("say what to clear: a FINGERPRINT (`sfl cache list` shows them), --edge HOST:PORT or --all")
    removed = [entry for place in _places(cache) for entry in _clear(place, fingerprint, edge)]
    if not removed and fingerprint is not None:
        raise SettingsError(f"nothing was cleared: no half in the cache is of {fingerprint}; see `sfl cache list`")
    typer.echo(f"cleared {len(removed)} halves, {sum(entry.size for entry in removed) / 1e6:.1f} MB")


def _places(cache: Path | None) -> list[HalfCache]:
    folders = [default_folder("device"), default_folder("edge")] if cache is None else [cache]
    return [HalfCache(folder, 0) for folder in folders]


def _row(place: HalfCache, entry: Entry) -> dict[str, Any]:
    names = {known.fingerprint: known.base_model for known in KnownEdges(place.folder).all().values()}
    return {
        "folder": str(place.folder),
        "model": names.get(entry.key.fingerprint),
        "fingerprint": entry.key.fingerprint,
        "cut": entry.key.cut,
        "precision": entry.key.precision,
        "bytes": entry.size,
        "used": entry.used,
        "state": ("complete" if entry.complete else "broken off") + (", in use" if place.in_use(entry.key) else ""),
    }


def _clear(place: HalfCache, fingerprint: str | None, edge: str | None) -> list[Entry]:
    """Delete what was asked for in one cache and return it; what is in use is named and stays."""
    beginning = fingerprint or ""
    if edge is not None:
        known = KnownEdges(place.folder)
        provided = known.all().get(edge)
        if provided is None:
            return []
        known.forget(edge)
        if provided.fingerprint in {other.fingerprint for other in known.all().values()}:
            return []  # another edge server provides it, too
        beginning = provided.fingerprint
    chosen = [entry for entry in place.entries() if entry.key.fingerprint.startswith(beginning)]
    removed = [entry for entry in chosen if place.remove(entry)]
    for entry in chosen:
        if entry not in removed:
            typer.echo(f"{entry.key} is in use and stays", err=True)
    if fingerprint is None and edge is None:
        for address in KnownEdges(place.folder).all():
            KnownEdges(place.folder).forget(address)
    return removed
