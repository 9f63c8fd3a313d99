"""`sfl compare`: strategies beside each other on one data set."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import typer

from sfl.cli.daemons import rest_between_steps
from sfl.cli.load_settings import as_toml, load, split_options
from sfl.errors import SettingsError, SflError
from sfl.telemetry import configure_logging, log

if TYPE_CHECKING:
    from sfl.compare.store import Store

_SHOW = "`sfl compare --show OUT` prints the tables of the runs that are finished in the folder OUT, also while others run."


def compare(context: typer.Context) -> None:
    """Compare strategies, merges and seeds on one data set, in this process; --show OUT prints what is finished."""
    from sfl.compare.settings import CompareSettings

    configure_logging("WARNING")
    if "--show" in context.args:
        _show(context.args)
        return
    options = split_options(context.args)
    settings = load(CompareSettings, options.config, options.rest, prog="sfl compare", epilog=_SHOW)
    if options.print_config:
        typer.echo(as_toml(settings), nl=False)
        return
    rest_between_steps()
    from rich.console import Console

    from sfl.compare.compare import compare as compare_all
    from sfl.compare.progress import EachOnce, Progress
    from sfl.compare.report import write_report

    log.addFilter(EachOnce())
    progress = Progress(Console(stderr=True))
    try:
        with _interrupted_by_sigterm():
            try:
                store, failed = compare_all(settings, progress)
            finally:
                progress.stop()
    except KeyboardInterrupt:
        typer.echo(_interrupted(settings.out), err=True)
        raise
    if store.outcomes():
        files = write_report(store)
        _print(store)
        for file in files:
            typer.echo(f"written: {file}")
    if failed:
        raise SflError(f"{len(failed)} runs failed ({', '.join(failed)}): see above; the same call tries them again")


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM is as Ctrl-C: what is on its way is cleared away, and what was made is named."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupted(out: Path) -> str:
    from sfl.compare.store import Store

    store = Store(out)
    finished = sum(map(len, store.outcomes().values()))
    if not finished:
        return "interrupted before a run was finished; the same call begins anew"
    return (
        f"interrupted: {finished} of {len(store.planned)} runs are finished and kept in {out}; the same call makes the others,"
        f" sfl compare --show {out} prints the tables"
    )


def _show(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[0] != "--show":
        raise SettingsError("--show takes the folder of a comparison and nothing else, as in sfl compare --show out/compare")
    from sfl.compare.store import Store

    store = Store(Path(arguments[1]))
    if not store.outcomes():
        raise SettingsError(f"{arguments[1]} holds no finished run of a comparison")
    _print(store)


def _print(store: Store) -> None:
    from rich.console import Console

    from sfl.compare.report import headline
    from sfl.compare.table import as_text

    screen = Console()
    if not screen.is_terminal:
        screen.width = 240  # a file or a pipe has room for the whole tables
    screen.print(headline(store), highlight=False, soft_wrap=True)
    for table in as_text(store.outcomes(), store.target, screen.width):
        screen.print(table)
