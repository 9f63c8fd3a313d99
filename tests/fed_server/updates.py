"""What the tests of merges, robust rules and privacy share: states and updates of any ranks and lags, and dense products."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence

import numpy as np

from sfl.adapters.state import FROZEN_A, FROZEN_B, HEAD, AdapterKey, AdapterState, Array, trained_part
from sfl.fed_server.merges import Merge
from sfl.fed_server.updates import Update

RANK = 4
SHAPES = {"q": (7, 5), "v": (5, 9)}  # out x in
PLACES = [(layer, module) for layer in range(2) for module in SHAPES]
WEIGHT = AdapterKey(HEAD, "score", "weight")


def state(seed: int, frozen: int = 0, rank: int = RANK) -> AdapterState:
    """A whole adapter of two layers and a head with random values, and with frozen factors of that rank."""
    rng = np.random.default_rng(seed)
    made: AdapterState = {}
    for layer, module in PLACES:
        out, into = SHAPES[module]
        made[AdapterKey(layer, module, "A")] = normal(rng, rank, into)
        made[AdapterKey(layer, module, "B")] = normal(rng, out, rank)
        if frozen:
            made[AdapterKey(layer, module, FROZEN_A)] = normal(rng, frozen, into)
            made[AdapterKey(layer, module, FROZEN_B)] = normal(rng, out, frozen)
    made[WEIGHT] = normal(rng, 3, 5)
    return made


def normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def update(
    device: str,
    delta: AdapterState,
    base: Callable[[], AdapterState] = dict,
    rank: int = RANK,
    lag: int = 0,
    examples: int = 1,
) -> Update:
    """An update that gives `delta` and lets nobody change it, as one that is read from files does."""
    fixed = {key: value.copy() for key, value in delta.items()}
    for value in fixed.values():
        value.flags.writeable = False

    def read(keys: Collection[AdapterKey] | None) -> AdapterState:
        return {key: value for key, value in fixed.items() if keys is None or key in keys}

    return Update(
        device=device,
        version=10 - lag,
        examples=examples,
        submissions=1,
        pooled=1,
        trained_on=1,
        steps=1,
        rank=rank,
        cut=1,
        lag=lag,
        read=read,
        base=base,
    )


def random_delta(merge: Merge, base: AdapterState, seed: int, scale: float = 0.5) -> AdapterState:
    """A delta of what a device trains of `base`, its view."""
    rng = np.random.default_rng(seed)
    return {key: np.float32(scale) * normal(rng, *base[key].shape) for key in merge.trained(base)}


def pool(
    merge: Merge, newest: AdapterState, ranks: Sequence[int], lags: Sequence[int] = (), seed: int = 100, scale: float = 0.5
) -> list[Update]:
    """One update a rank, of `newest` or, `lag` versions behind, of a state of its own."""
    made = []
    for number, rank in enumerate(ranks):
        lag = lags[number] if lags else 0
        view = merge.view(newest if not lag else state(1000 + lag, frozen=2), rank, f"version {10 - lag}")
        delta = random_delta(merge, view, seed + number, scale)
        made.append(update(f"device-{number}", delta, lambda view=view: view, rank, lag))
    return made


def trained_product(adapter: AdapterState, place: tuple[int, str]) -> Array:
    """B A in float64."""
    a, b = (adapter[AdapterKey(*place, part)].astype(np.float64) for part in ("A", "B"))
    return b @ a


def whole_product(adapter: AdapterState, place: tuple[int, str]) -> Array:
    """W = B A + frozen_B frozen_A in float64."""
    product = trained_product(adapter, place)
    key_a, key_b = AdapterKey(*place, FROZEN_A), AdapterKey(*place, FROZEN_B)
    if key_a in adapter:
        product = product + adapter[key_b].astype(np.float64) @ adapter[key_a].astype(np.float64)
    return product


def ended(one: Update) -> AdapterState:
    """What a device's view became in its training."""
    result = {key: value.copy() for key, value in one.base().items()}
    for key, value in one.delta().items():
        result[key] += value
    return result


def progress(one: Update, place: tuple[int, str]) -> Array:
    """B_k A_k - B_k^0 A_k^0."""
    return trained_product(ended(one), place) - trained_product(one.base(), place)


def padded(delta: AdapterState, like: AdapterState, rank: int) -> AdapterState:
    """`delta` of a smaller rank with zeros around it."""
    result = {key: np.zeros_like(like[key]) for key in delta}
    for key, value in delta.items():
        result[key][trained_part(key, rank)] = value
    return result


def replaced(one: Update, attack: Callable[[AdapterState], AdapterState]) -> Update:
    """The same device's update after an attack on it."""
    return dataclasses.replace(update(one.device, attack(one.delta()), one.base, one.rank, one.lag), examples=one.examples)
