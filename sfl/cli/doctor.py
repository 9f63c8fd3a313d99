"""`sfl doctor`: line by line, what a daemon needs and whether it is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from json import dumps

import typer

from sfl.cli.daemons import rest_between_steps
from sfl.cli.load_settings import load, split_options
from sfl.doctor.finding import Finding, broke
from sfl.errors import SettingsError
from sfl.model.lean_imports import lean_imports
from sfl.settings import DaemonSettings, DeviceSettings, EdgeSettings, FedSettings
from sfl.telemetry import configure_logging

_MODELS: dict[str, type[DaemonSettings]] = {"device": DeviceSettings, "edge": EdgeSettings, "fed": FedSettings}
_SHOWN = {"passed": ("ok", "green"), "warned": ("WARN", "yellow"), "failed": ("FAIL", "red"), "skipped": ("-", "bright_black")}
_WIDTH = 28
_HELP = """usage: sfl doctor [device|edge|fed] [--config FILE] [--json] [--SETTING VALUE]...

Check whether this machine has what a daemon needs, and whether it reaches its servers: versions, the processor, each
number format, memory and disks; with the daemon's settings also its data and model, and of each server the name, the
route, TLS, rights and clock. A device unless another is named. Exit code 1 if something failed.

  --config FILE      the daemon's configuration; without it only the machine is looked at
  --json             print one JSON array
  --SETTING VALUE    settings as the daemon takes them: see sfl device --help"""


def doctor(context: typer.Context) -> None:
    """Check this machine, and the way to the servers; sfl doctor --help says more."""
    arguments = list(context.args)
    if "--help" in arguments:
        typer.echo(_HELP)
        return
    as_json = "--json" in arguments
    arguments = [argument for argument in arguments if argument != "--json"]
    role = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "device"
    if role not in _MODELS:
        raise SettingsError(f"'{role}' is no daemon: choose device, edge or fed")
    configure_logging("ERROR")
    rest_between_steps()
    lean_imports()
    findings = []
    for finding in _findings(role, arguments):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        typer.echo(dumps([asdict(finding) for finding in findings], indent=2))
    else:
        counts = {state: sum(finding.state == state for finding in findings) for state in _SHOWN}
        typer.echo(", ".join(f"{count} {state}" for state, count in counts.items() if count))
    if any(finding.state == "failed" for finding in findings):
        raise typer.Exit(1)


def _findings(role: str, arguments: list[str]) -> Iterator[Finding]:
    from sfl.doctor.examine import examine

    settings: DaemonSettings | None = None
    if arguments:
        options = split_options(arguments)
        try:
            settings = load(_MODELS[role], options.config, options.rest, prog=f"sfl doctor {role}")
        except SettingsError as error:
            yield broke("settings", error)
    yield from examine(role, settings)  # type: ignore[arg-type]  # one of the keys above


def _show(finding: Finding) -> None:
    word, colour = _SHOWN[finding.state]
    typer.echo(f"{typer.style(f'{word:4}', fg=colour, bold=finding.state == 'failed')} {finding.name:{_WIDTH}} {finding.found}")
    if finding.advice:
        typer.echo(f"{'':4} {'':{_WIDTH}} -> {finding.advice}")
