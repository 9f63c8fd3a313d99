"""Merges of LoRA adapters by name.

At an aggregation, after clipping, robust rule and the strategy's weights:

    merge = make_merge(settings.merge)
    merged = merge.merge(newest.state, updates, weights)   # then noise, then the strategy's optimiser

and for a device of rank r that fetches version n, or whose update stems from it: `merge.view(state_n, r, f"version {n}")`.

`average` and `hetlora` add factors; `ffa`, `fedex` and `flora` give the mean of the products exactly, `flexlora` its best
approximation. What counts of an update is its progress: how it changed the factors, or their product, that its device had
started from.
"""

from __future__ import annotations

from sfl.errors import SettingsError
from sfl.fed_server.merges.average import Average, Ffa
from sfl.fed_server.merges.base import Merge
from sfl.fed_server.merges.fedex import FedEx
from sfl.fed_server.merges.flexlora import FlexLora, FlexLoraPrinted
from sfl.fed_server.merges.flora import Flora
from sfl.fed_server.merges.hetlora import HetLora

__all__ = ["MERGES", "Merge", "make_merge"]

MERGES: dict[str, type[Merge]] = {merge.name: merge for merge in (Average, Ffa, FedEx, Flora, FlexLora, FlexLoraPrinted, HetLora)}


def make_merge(name: str) -> Merge:
    """The merge of that name. Raises `SettingsError` for another one."""
    if name not in MERGES:
        raise SettingsError(f"there is no merge '{name}': choose one of {', '.join(MERGES)}")
    return MERGES[name]()
