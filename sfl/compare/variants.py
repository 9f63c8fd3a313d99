"""From settings to the variants that are compared: strategies with merges, and named ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from sfl.compare.settings import CompareSettings, RunSettings
from sfl.errors import SettingsError
from sfl.settings import FedSettings

CENTRALISED = "centralised"

Model = TypeVar("Model", bound=BaseModel)

_DEFAULT = (CENTRALISED, "fedavg", "gsfs")
_OURS = (
    "name",
    "listen",
    "out",
    "log_level",
    "adapters",
    "keep_versions",
    "devices",
    "labels",
)  # of the federation server's: not for variants


@dataclass(frozen=True)
class Variant:
    """One row of the table: what its devices have, and what its federation server is told besides their number and labels.

    `centralised` has all examples at one place.
    """

    name: str
    settings: RunSettings
    fed: dict[str, Any]
    centralised: bool = False

    def fed_settings(self, devices: int, labels: tuple[str, ...]) -> FedSettings:
        """Raises `SettingsError` for what the federation server does not know or cannot do."""
        return checked(FedSettings, {**self.fed, "devices": devices, "labels": labels}, f"run '{self.name}'")


def variants(settings: CompareSettings) -> list[Variant]:
    """All variants, in the order of the table. Raises `SettingsError` for what is unknown, or a name that is there twice."""
    strategies = settings.strategies or (() if settings.run else _DEFAULT)
    grid: list[dict[str, Any]] = []
    for strategy in strategies:
        if strategy == CENTRALISED:
            grid.append({"name": CENTRALISED, "strategy": CENTRALISED})
            continue
        for merge in settings.merges or (None,):
            named = len(settings.merges) > 1
            table = {"name": f"{strategy}, {merge}" if named else strategy, "strategy": strategy}
            grid.append(table if merge is None else {**table, "merge": merge})
    found = [_variant(settings, table) for table in (*grid, *settings.run)]
    names = [variant.name for variant in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SettingsError(f"two runs have the name '{min(twice)}': give each [[run]] a name of its own")
    return found


def _variant(settings: CompareSettings, table: Mapping[str, Any]) -> Variant:
    name = table.get("name")
    if not isinstance(name, str) or not name.strip():
        raise SettingsError(f'a [[run]] table has no name: give it one, as in name = "gsfs, no network" ({dict(table)})')
    shared = {key: value for key, value in settings.model_dump().items() if key in RunSettings.model_fields}
    changes = {key: value for key, value in table.items() if key in RunSettings.model_fields}
    of_server = {key: value for key, value in table.items() if key not in changes and key != "name"}
    if isinstance(of_server.get("strategy"), str):
        of_server["strategy"] = {"name": of_server["strategy"]}
    allowed = [key for key in FedSettings.model_fields if key not in _OURS]
    for key in of_server:
        if key not in allowed:
            raise SettingsError(
                f"run '{name}' has the unknown setting '{key}': there are {', '.join((*RunSettings.model_fields, *allowed))}"
            )
    own = checked(RunSettings, merged(shared, changes), f"run '{name}'")
    fed = merged(own.fed, of_server)
    strategy = fed.get("strategy", {})
    if isinstance(strategy, dict) and strategy.get("name") == CENTRALISED:
        return Variant(name, own, {}, centralised=True)
    return Variant(name, own, fed)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, which go into its tables."""
    result = dict(base)
    for key, value in changes.items():
        inside = result.get(key)
        result[key] = merged(inside, value) if isinstance(inside, dict) and isinstance(value, Mapping) else value
    return result


def checked(model: type[Model], values: Mapping[str, Any], whose: str) -> Model:
    """`values` as settings. Raises `SettingsError` that names the first wrong one and says whose it is."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
        shown = first["type"] not in ("missing", "value_error") and not isinstance(first["input"], (dict, BaseModel))
        given = f" = {first['input']!r}" if shown else ""
        raise SettingsError(f"{whose}: {where}{given}{': ' if where else ''}{message}") from None
