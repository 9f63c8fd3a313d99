"""The three places that settings come from, each read into the same form: dotted name -> value and origin."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sfl.cli.flags import flags_parser
from sfl.cli.names import (
    ENVIRONMENT_PREFIX,
    flag_of,
    groups_of,
    is_list,
    is_optional,
    is_switch,
    nearest,
    settings_of,
    variable_of,
)
from sfl.errors import ConfigFileError, SettingsError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class Given(NamedTuple):
    """A value as it was given, and where, in words: "in device.toml", "from SFL_SEED", "from --seed"."""

    value: Any
    origin: str


def from_file(path: Path, known: Mapping[str, FieldInfo]) -> dict[str, Given]:
    """Settings in a TOML file. Raises `SettingsError` for a file that cannot be read or holds an unknown key."""
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigFileError(f"there is no configuration file {path}: check the path given with --config") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"the configuration file {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigFileError(f"the configuration file {path} is not valid TOML: {error}") from error
    groups = groups_of(known)
    given: dict[str, Given] = {}

    def walk(table: Mapping[str, Any], prefix: str) -> None:
        for key, value in table.items():
            name = prefix + key
            if name in known:
                given[name] = Given(value, f"in {path.name}")
            elif name not in groups:
                _refuse(f"unknown setting '{name}' in {path.name}", name, {other: other for other in known})
            elif isinstance(value, dict):
                walk(value, name + ".")
            else:
                raise SettingsError(f"'{name}' in {path.name} must be a table, as in [{name}], and not {value!r}")

    walk(tree, "")
    return given


def from_environment(environment: Mapping[str, str], known: Mapping[str, FieldInfo]) -> dict[str, Given]:
    """Settings in variables such as `SFL_LORA__RANK`; lists as `a,b` or JSON. Raises `SettingsError` for an unknown variable."""
    names = {variable_of(name): name for name in known}
    given = {}
    for variable, text in environment.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            if variable not in names:
                meant = variable.removeprefix(ENVIRONMENT_PREFIX).replace("__", ".").lower()
                _refuse(f"unknown setting {variable} in the environment", meant, {name: variable_of(name) for name in known})
            name = names[variable]
            given[name] = Given(_parse(text, known[name]), f"from {variable}")
    return given


def from_flags(
    model: type[BaseModel],
    arguments: Sequence[str],
    prog: str,
    parents: Sequence[argparse.ArgumentParser] = (),
    epilog: str | None = None,
) -> dict[str, Given]:
    """Settings given as `--lora.rank 4` or `--lora-rank=4`; lists as `a,b`, repeated or as JSON.

    `--help` prints all settings and ends the process. Raises `SettingsError` for an unknown flag or one without a value.
    """
    known = settings_of(model)
    parser = flags_parser(model, prog, parents, epilog)
    found = vars(parser.parse_args([_canonical(argument, known) for argument in arguments]))
    given = {}
    for name in known.keys() & found.keys():
        value = found[name]
        if is_list(known[name]):
            parts = [_parse(text, known[name]) for text in value]
            unread = [part for part in parts if isinstance(part, str)]  # broken JSON, refused later like in a variable
            value = unread[0] if unread else [item for part in parts for item in part]
        elif isinstance(value, str):
            value = _parse(value, known[name])
        given[name] = Given(value, f"from {flag_of(name)}")
    return given


def _canonical(argument: str, known: Mapping[str, FieldInfo]) -> str:
    """`--lora-rank=4` and `--lora.rank=4` both as `--lora.rank=4`; what is no flag as it is."""
    if not argument.startswith("--") or argument == "--help":
        return argument
    written, equals, value = argument.partition("=")
    switches = [f"--no-{flag_of(name)[2:]}" for name, field in known.items() if is_switch(field)]
    flags = {_plain(flag): flag for flag in [*map(flag_of, known), *switches]}
    if _plain(written) not in flags:
        _refuse(f"unknown setting {written}", written[2:].replace("-", "_"), {name: flag_of(name) for name in known})
    return flags[_plain(written)] + equals + value


def _plain(flag: str) -> str:
    return flag.replace(".", "-").replace("_", "-")


def _parse(text: str, field: FieldInfo) -> Any:
    """What a variable's text means where pydantic would not know: lists and None."""
    if is_optional(field) and text in ("", "None"):
        return None
    if not is_list(field):
        return text
    if text.startswith("["):
        try:
            return json.loads(text)
        except ValueError:
            return text  # refused, with its name and origin, when all settings are checked
    return [item.strip() for item in text.split(",")] if text.strip() else []


def _refuse(message: str, name: str, spelling: Mapping[str, str]) -> NoReturn:
    """Raise with the nearest known setting, spelt as its source spells it."""
    meant = nearest(name, spelling)
    hint = f"did you mean {spelling[meant]}?" if meant else "`--help` lists all settings"
    raise SettingsError(f"{message}: {hint}")
