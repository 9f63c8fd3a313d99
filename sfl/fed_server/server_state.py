"""The server state of a version in files beside the adapter, so that a server started anew goes on from it.

`devices.json` holds the weights of the devices whose updates made the version. `server_state.safetensors` holds the server
optimiser's moments, each tensor under STRATEGY/MOMENT/KEY; it is there only with such an optimiser. `privacy.json` holds what
each device has spent of its privacy, "inf" once a version without noise holds an update of it; it is there only where updates
are clipped, or the version before has been removed. A version without it promised nothing: the devices in it have spent all that
there is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sfl.adapters.state import AdapterKey
from sfl.errors import AdapterError
from sfl.fed_server.aggregation import Aggregated, ServerState
from sfl.fed_server.strategies import Moments, Strategy
from sfl.fed_server.versions import Version, VersionStore
from sfl.telemetry import log

DEVICES, MOMENTS, SPENT = "devices.json", "server_state.safetensors", "privacy.json"


def files(done: Aggregated, strategy: str) -> dict[str, bytes]:
    """The files with the server state of `done`, by name."""
    found = {DEVICES: json.dumps(done.weights).encode()}
    if done.server_state.moments:
        moments = done.server_state.moments.items()
        found[MOMENTS] = save_tensors(
            {f"{strategy}/{name}/{key}": value for name, state in moments for key, value in state.items()}
        )
    if done.server_state.spent:
        found[SPENT] = _account(done.server_state.spent)
    return found


def _account(spent: Mapping[str, float]) -> bytes:
    finite = {device: value if math.isfinite(value) else str(value) for device, value in spent.items()}
    return json.dumps(finite).encode()  # JSON has no infinity


def hand_over(store: VersionStore, version: int) -> None:
    """Write what was spent up to the version after `version`, which is about to be removed, beside that one if it is not there.

    Where it is not known, nothing is written, and a server that needs to know does not start: see `load`. Raises
    `AdapterWriteError` when the file cannot be written.
    """
    if store.extra(version + 1, SPENT) is not None:
        return
    try:
        spent = _spent(store, version + 1)
    except AdapterError as error:
        log.debug("%s", error)
        return
    store.add_extra(version + 1, SPENT, _account(spent))


def load(store: VersionStore, newest: Version, strategy: Strategy, private: bool) -> ServerState:
    """The server state up to `newest`; of moments only those of `strategy`, and what was spent only if it is `private` now.

    Raises `AdapterError` when a file is damaged or one that is needed is missing, or its moments are not of that version's
    tensors.
    """
    moments = _load_moments(store, newest.number, strategy.settings.name)
    try:
        strategy.check_moments(moments, newest.state)
    except AdapterError as error:
        raise AdapterError(
            f"{MOMENTS} of version {newest.number} does not belong to it: {error}; delete that file to begin without moments"
        ) from error
    return ServerState(moments, _spent(store, newest.number) if private else {})


def _spent(store: VersionStore, newest: int) -> dict[str, float]:
    """The last account that was kept, infinite for the devices in later versions, which had no privacy."""
    since: dict[str, float] = {}
    for version in range(newest, 0, -1):
        if (kept := _figures(store, version, SPENT)) is not None:
            return kept | since
        weights = _figures(store, version, DEVICES)
        if weights is None:
            raise AdapterError(
                f"version {version} in {store.folder} has no {DEVICES}, so it is not known whose updates it holds and what they"
                " have spent of their privacy: choose another folder with `adapters`"
            )
        since |= {device: math.inf for device, weight in weights.items() if weight > 0}
    return since


def _figures(store: VersionStore, version: int, name: str) -> dict[str, float] | None:
    """The number of each device in a file of a version; None where there is no such file."""
    content = store.extra(version, name)
    if content is None:
        return None
    try:
        figures = {str(device): float(value) for device, value in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{name} of version {version} is damaged: {error}") from error
    if any(math.isnan(value) or value < 0 for value in figures.values()):
        raise AdapterError(f"{name} of version {version} is damaged: no number in it can be less than 0")
    return figures


def _load_moments(store: VersionStore, version: int, strategy: str) -> Moments:
    """Nothing where another strategy had made the version, which is logged."""
    content = store.extra(version, MOMENTS)
    found: Moments = {}
    if content is None:
        return found
    try:
        for name, value in load_tensors(content).items():
            whose, moment, key = name.split("/", 2)
            if whose != strategy:
                log.warning("version %d was made by %s: %s begins without its moments", version, whose, strategy)
                return {}
            found.setdefault(moment, {})[AdapterKey.parse(key)] = value
    except (SafetensorError, ValueError, AdapterError) as error:
        raise AdapterError(f"{MOMENTS} of version {version} is damaged: {error}") from error
    return found
