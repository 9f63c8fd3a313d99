"""A daemon's settings: defaults, a TOML file, the environment, flags; each overrides those before it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from sfl.base_settings import Settings
from sfl.cli.names import flag_of, groups_of, nested, settings_of, variable_of
from sfl.cli.sources import Given, from_environment, from_file, from_flags
from sfl.errors import SettingsError

Model = TypeVar("Model", bound=BaseModel)


class Options(NamedTuple):
    """What a daemon's command takes besides settings; `rest` are the arguments that may be settings."""

    config: Path | None
    print_config: bool
    rest: list[str]


def _options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with settings")
    parser.add_argument("--print-config", action="store_true", help="print the settings in force, as a TOML file, and exit")
    return parser


def split_options(arguments: Sequence[str]) -> Options:
    """Take `--config` and `--print-config` out of `arguments`. Raises `SettingsError` for a `--config` without a file."""
    if arguments and arguments[-1] == "--config":
        raise SettingsError("--config needs a file")
    known, rest = _options_parser().parse_known_args(arguments)
    return Options(known.config, known.print_config, rest)


def load(
    model: type[Model],
    config: Path | None,
    arguments: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
    prog: str = "sfl",
    epilog: str | None = None,
) -> Model:
    """Settings from the TOML file `config`, then `SFL_...` variables, then flags, the later ones overriding.

    `environment` is the process's own unless given. Raises `SettingsError`, naming each wrong setting, where it came from
    and what is allowed. `--help` among the arguments prints the settings, `epilog` below them, and ends the process.
    """
    known = settings_of(model)
    flags = from_flags(model, arguments, prog, [_options_parser()], epilog)  # first, so that --help works whatever the file says
    given = from_file(config, known) if config is not None else {}
    given |= from_environment(os.environ if environment is None else environment, known)
    given |= flags
    tree = nested({name: entry.value for name, entry in given.items()})
    for group in groups_of(known):
        _table(tree, group)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(_explain(error, given, known)) from None


def as_toml(settings: Settings) -> str:
    """The settings as a TOML file that `load` reads back to the same ones."""
    return tomli_w.dumps(settings.written())


def _table(tree: dict[str, Any], group: str) -> None:
    """Have a table for `group`, so that what is required in it is missed by its full name."""
    for part in group.split("."):
        tree = tree.setdefault(part, {})


def _explain(error: ValidationError, given: Mapping[str, Given], known: Mapping[str, Any]) -> str:
    problems = []
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        name = next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in known), ".".join(parts))
        message = item["msg"].removeprefix("Value error, ").removeprefix("Input ")
        if item["type"] == "missing":
            problems.append(f"{name} is not set: give it in the configuration file, as {variable_of(name)} or as {flag_of(name)}")
        elif name in given:
            problems.append(f"{name} = {given[name].value!r} {given[name].origin}: {message}")
        else:
            problems.append(f"{name}: {message}")
    return problems[0] if len(problems) == 1 else "\n  ".join([f"{len(problems)} settings are wrong:", *problems])
