"""An argument parser with a flag for every setting, and its help from the settings' descriptions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sfl.cli.names import flag_of, is_list, is_switch, settings_of
from sfl.errors import SettingsError

_METAVARS = {int: "N", float: "X", Path: "PATH"}


def flags_parser(
    model: type[BaseModel], prog: str, parents: Sequence[argparse.ArgumentParser] = (), epilog: str | None = None
) -> argparse.ArgumentParser:
    """A parser whose result holds, by dotted name, what was given: text, a bool for a switch, a list of texts for a list.

    Values are not checked here. The parser raises `SettingsError` for wrong usage.
    """
    usage = "%(prog)s [--config FILE] [--print-config] [--SETTING VALUE]..."
    parser = _Parser(prog=prog, usage=usage, description=model.__doc__, epilog=epilog, parents=list(parents), allow_abbrev=False)
    tables: dict[str, argparse._ArgumentGroup] = {}
    for name, field in settings_of(model).items():
        table = name.rpartition(".")[0]
        if table not in tables:
            field_of_table = model.model_fields.get(table)
            tables[table] = parser.add_argument_group(table or "settings", field_of_table and field_of_table.description)
        _add(tables[table], name, field)
    return parser


def _add(group: argparse._ArgumentGroup, name: str, field: FieldInfo) -> None:
    help_text = f"{field.description}{_default(field)}".replace("%", "%%")
    common: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": help_text}
    if is_switch(field):
        group.add_argument(flag_of(name), action=argparse.BooleanOptionalAction, **common)
    else:
        group.add_argument(flag_of(name), action="append" if is_list(field) else "store", metavar=_metavar(field), **common)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return " (required)"
    default = field.default
    if default is None or default == () or default == {}:
        return ""
    if isinstance(default, bool):
        return f" (default: {'yes' if default else 'no'})"
    return f" (default: {','.join(map(str, default)) if isinstance(default, tuple) else default})"


def _metavar(field: FieldInfo) -> str:
    kinds = [kind for kind in (field.annotation, *get_args(field.annotation)) if kind is not type(None)]
    choices = next((get_args(kind) for kind in kinds if get_origin(kind) is Literal), None)
    words = [word for kind, word in _METAVARS.items() if kind in kinds]
    if choices:
        return "{" + ",".join((*words, *choices)) + "}"
    if is_list(field):
        return "A,B,..."
    return words[0] if words else "TEXT"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"{message}; `{self.prog} --help` lists all settings")
