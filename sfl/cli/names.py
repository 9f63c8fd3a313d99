"""Names of settings: `lora.rank` in messages and files, `SFL_LORA__RANK` in the environment, `--lora.rank` as a flag."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

ENVIRONMENT_PREFIX = "SFL_"


def settings_of(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """All settings that `model` holds, nested ones too, by dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        table = table_of(field)
        if table:
            found |= settings_of(table, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def table_of(field: FieldInfo) -> type[BaseModel] | None:
    """The model behind a field that is a table of settings; None for a plain setting."""
    kind = field.annotation
    if isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, BaseModel):
        return kind
    return None


def groups_of(known: Collection[str]) -> set[str]:
    """Dotted names of the tables that hold the `known` settings: `lora` for `lora.rank`."""
    return {name[:i] for name in known for i, character in enumerate(name) if character == "."}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def variable_of(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.replace(".", "__").upper()


def is_list(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def is_switch(field: FieldInfo) -> bool:
    return bool in (field.annotation, *get_args(field.annotation))


def is_optional(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"lora.rank": 4}` as `{"lora": {"rank": 4}}`."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        *groups, last = name.split(".")
        branch = tree
        for group in groups:
            branch = branch.setdefault(group, {})
        branch[last] = value
    return tree


def nearest(name: str, known: Collection[str]) -> str | None:
    """The known setting that was most likely meant, if one is alike: as a whole, or but for the table that it is in."""

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], other.rpartition(".")[2]).ratio()
        return max(whole, last) + whole / 100  # of two equal last names, the one in the likelier table

    best = max(known, key=likeness)
    return best if likeness(best) > 0.6 else None
