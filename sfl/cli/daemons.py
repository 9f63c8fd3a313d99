"""`sfl fed`, `sfl edge` and `sfl device`: settings in, then the daemon runs until it is done or stopped."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any, TypeVar

import typer

from sfl.cli.load_settings import as_toml, load, split_options
from sfl.model.lean_imports import lean_imports
from sfl.phases import phase
from sfl.settings import DaemonSettings, DeviceSettings, EdgeSettings, FedSettings
from sfl.telemetry import configure_logging

Daemon = TypeVar("Daemon", bound=DaemonSettings)

# All arguments reach `load`, which knows every setting and prints the help.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": list[str]()}


def fed(context: typer.Context) -> None:
    """Run the federation server (needs no torch)."""
    settings = _settings(FedSettings, context)
    import_module("sfl.fed_server.daemon").run(settings)


def edge(context: typer.Context) -> None:
    """Run an edge server: the deeper blocks, once for all its devices."""
    settings = _settings(EdgeSettings, context)
    rest_between_steps()
    lean_imports()
    import_module("sfl.edge_server.daemon").run(settings)


def device(context: typer.Context) -> None:
    """Run a device: its data, the embeddings and the first blocks."""
    settings = _settings(DeviceSettings, context)
    rest_between_steps()
    if not settings.profile:
        settings = _provided(settings)
        _import_device().run(settings)
        return
    from sfl.profiling.daemon import recorded

    with recorded(settings) as recorder:
        recorder.settings = settings = _provided(settings)
        _import_device().run(settings, recorder)


def _provided(settings: DeviceSettings) -> DeviceSettings:
    with phase("provision"):
        settled: DeviceSettings = import_module("sfl.device.provision").provided(settings)
        return settled


def _import_device() -> Any:
    with phase("import"):
        lean_imports()
        return import_module("sfl.device.daemon")


def rest_between_steps() -> None:
    """Keep OpenMP's threads from spinning when a half has computed: they would take the cores from the other half or the wire.

    Read when torch is loaded, so it comes before. Whoever sets either variable keeps that.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def _settings(model: type[Daemon], context: typer.Context) -> Daemon:
    """Settings in force; ends the process after printing them if that is what was asked for."""
    options = split_options(context.args)
    settings = load(model, options.config, options.rest, prog=f"sfl {context.info_name}")
    if options.print_config:
        typer.echo(as_toml(settings), nl=False)
        raise typer.Exit
    configure_logging(settings.log_level, settings.log_format, settings.name)
    return settings
