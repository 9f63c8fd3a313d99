"""The command `sfl`: commands, exit codes, and errors as one line with their number instead of a traceback.

Exit codes: 0 done, 1 failed in a way that may pass, 2 wrong usage, settings, data, model or certificate: nobody need try again
before something was mended; 130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from sfl import __version__
from sfl.cli.cache import app as cache
from sfl.cli.certs import app as certs
from sfl.cli.compare import compare
from sfl.cli.daemons import PASS_ON, device, edge, fed
from sfl.cli.demo import demo
from sfl.cli.doctor import doctor
from sfl.cli.errors import errors
from sfl.cli.evaluate import evaluate
from sfl.cli.generate import generate
from sfl.cli.health import health
from sfl.cli.plan import plan
from sfl.cli.profile import profile
from sfl.cli.status import status
from sfl.errors import SflError, as_ours
from sfl.telemetry import is_structured, log


class _Group(TyperGroup):
    """Shows what is wrong with an option without the words that pydantic, in typer, puts before it."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]  # typer's context is click's
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            error.message = error.message.removeprefix("Value error, ")
            raise


app = typer.Typer(cls=_Group, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(demo)
app.command(context_settings=PASS_ON)(fed)
app.command(context_settings=PASS_ON)(edge)
app.command(context_settings=PASS_ON)(device)
app.command("eval")(evaluate)
app.command()(generate)
app.add_typer(cache, name="cache")
app.add_typer(certs, name="certs")
app.command()(profile)
app.command()(plan)
app.command(context_settings=PASS_ON)(compare)
app.command(context_settings=PASS_ON)(status)
app.command(context_settings=PASS_ON)(doctor)
app.command(context_settings=PASS_ON)(health)
app.command()(errors)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"sfl {__version__}")
        raise typer.Exit


@app.callback()
def _sfl(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="show the version")] = False,
) -> None:
    """Split federated LoRA fine-tuning for devices that could never hold the model."""


def main() -> None:
    """Run the command line and exit; what a user can cause or meet ends in one line on standard error."""
    try:
        app(prog_name="sfl")
    except (SflError, ModuleNotFoundError, OSError) as error:
        ours = as_ours(error)
        if ours is None:
            raise
        _fail(ours)
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(error: SflError) -> NoReturn:
    log.debug("where it happened", exc_info=True)
    if is_structured():
        log.error("%s", error, extra={"fields": {"error": error.code}})
    else:
        print(f"error {error.code}: {error}", file=sys.stderr)
    sys.exit(2 if error.lasting else 1)


if __name__ == "__main__":
    main()
