"""What the federation server remembers with a version, in files beside the adapter, so that one started anew goes on from it.

`server_state.safetensors` holds the server optimiser's moments, each tensor under STRATEGY/MOMENT/KEY, and `privacy.json` what
each device has spent of its privacy, "inf" once a version without noise holds an update of it. Either is there only where
there is something in it.
"""

from __future__ import annotations

import json
import math

from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sfl.adapters.state import AdapterKey
from sfl.errors import AdapterError
from sfl.fed_server.aggregation import Remembered
from sfl.fed_server.strategies import Memory, Strategy
from sfl.fed_server.versions import Version, VersionStore
from sfl.telemetry import log

MOMENTS, SPENT = "server_state.safetensors", "privacy.json"


def files(remembered: Remembered, strategy: str) -> dict[str, bytes]:
    """The files with what is remembered, by name."""
    found: dict[str, bytes] = {}
    if remembered.moments:
        moments = remembered.moments.items()
        found[MOMENTS] = save_tensors(
            {f"{strategy}/{name}/{key}": value for name, state in moments for key, value in state.items()}
        )
    if remembered.spent:
        spent = {device: value if math.isfinite(value) else str(value) for device, value in remembered.spent.items()}
        found[SPENT] = json.dumps(spent).encode()  # JSON has no infinity
    return found


def load(store: VersionStore, newest: Version, strategy: Strategy) -> Remembered:
    """What was remembered with `newest`; of moments only those of `strategy`.

    Raises `AdapterError` when a file is damaged, or its moments are not of that version's tensors.
    """
    moments = _load_moments(store, newest.number, strategy.settings.name)
    try:
        strategy.check_memory(moments, newest.state)
    except AdapterError as error:
        raise AdapterError(
            f"{MOMENTS} of version {newest.number} does not belong to it: {error}; delete that file to begin without moments"
        ) from error
    return Remembered(moments, _load_spent(store, newest.number))


def _load_spent(store: VersionStore, version: int) -> dict[str, float]:
    content = store.extra(version, SPENT)
    if content is None:
        return {}
    try:
        spent = {str(device): float(value) for device, value in json.loads(content).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise AdapterError(f"{SPENT} of version {version} is damaged: {error}") from error
    if any(math.isnan(value) or value < 0 for value in spent.values()):
        raise AdapterError(f"{SPENT} of version {version} is damaged: nothing can have been spent that is less than 0")
    return spent


def _load_moments(store: VersionStore, version: int, strategy: str) -> Memory:
    """Nothing where another strategy had made the version, which is logged."""
    content = store.extra(version, MOMENTS)
    memory: Memory = {}
    if content is None:
        return memory
    try:
        for name, value in load_tensors(content).items():
            whose, moment, key = name.split("/", 2)
            if whose != strategy:
                log.warning("version %d was made by %s: %s begins without its moments", version, whose, strategy)
                return {}
            memory.setdefault(moment, {})[AdapterKey.parse(key)] = value
    except (SafetensorError, ValueError, AdapterError) as error:
        raise AdapterError(f"{MOMENTS} of version {version} is damaged: {error}") from error
    return memory
