"""Merges that add factors: the plain average, and FFA-LoRA's with A frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfl.adapters.state import AdapterState
from sfl.fed_server.merges.base import Merge
from sfl.fed_server.updates import Update


class Average(Merge):
    """A <- A + sum w_k dA_k, B <- B + sum w_k dB_k (FedIT); smaller ranks padded with zeros.

    Not the mean of the products: that would have sum w_k dB_k dA_k where this has (sum w_k dB_k)(sum w_k dA_k).
    """

    name = "average"
    additive = True

    def merge(self, state: AdapterState, updates: Sequence[Update], weights: Mapping[str, float]) -> AdapterState:
        return self.averaged(state, updates, weights)


class Ffa(Average):
    """FFA-LoRA (Sun et al. 2024): A stays as version 0 has it, B <- B + sum w_k dB_k.

    So the mean of the products is exact at half the bytes: sum w_k dB_k A[:r_k] = (sum w_k [dB_k, 0]) A, for any ranks.
    """

    name = "ffa"
    frozen_parts = ("A",)
