from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfl.adapters.layout import LoraSpec
from sfl.adapters.state import HEAD, AdapterKey, device_half, difference, edge_half, norm, scaled, total
from sfl.errors import AdapterError

names = st.text(st.characters(codec="utf-8", exclude_characters="/"), min_size=1)


@given(st.one_of(st.integers(0, HEAD - 1), st.just(HEAD)), names, names)
def test_a_key_survives_its_text(layer: int, module: str, part: str) -> None:
    key = AdapterKey(layer, module, part)
    assert AdapterKey.parse(str(key)) == key


@pytest.mark.parametrize("text", ["", "3", "3/q", "x/q/A", "-1/q/A", "3//A", "3/q/A/B"])
def test_a_text_that_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(AdapterError, match="no adapter key"):
        AdapterKey.parse(text)


def test_the_halves_of_any_cut_are_the_whole() -> None:
    state = {AdapterKey(layer, "q", part): np.full(2, layer, "f4") for layer in range(4) for part in "AB"}
    state[AdapterKey(HEAD, "score", "weight")] = np.ones(2, "f4")
    for cut in range(1, 4):
        assert not device_half(state, cut).keys() & edge_half(state, cut).keys()
        assert device_half(state, cut) | edge_half(state, cut) == state
        assert AdapterKey(HEAD, "score", "weight") in edge_half(state, cut)


def test_difference_and_total_name_what_does_not_fit() -> None:
    left = {AdapterKey(0, "q", "A"): np.ones((2, 3), "f4")}
    assert (difference(total(left, left), left)[AdapterKey(0, "q", "A")] == 1).all()
    with pytest.raises(AdapterError, match=r"0/q/A is missing"):
        total({}, left)
    with pytest.raises(AdapterError, match=r"0/q/A has shape \(3,\), expected \(2, 3\)"):
        difference({AdapterKey(0, "q", "A"): np.ones(3, "f4")}, left)


def test_a_norm_is_over_all_tensors_together_and_scales() -> None:
    state = {AdapterKey(0, "q", "A"): np.full((1, 2), 2.0, "f4"), AdapterKey(HEAD, "score", "weight"): np.ones(1, "f4")}
    assert norm(state) == 3.0 and norm({}) == 0.0
    turned = scaled(state, -0.5)
    assert norm(turned) == 1.5 and turned[AdapterKey(0, "q", "A")].dtype == np.float32
    assert (turned[AdapterKey(0, "q", "A")] == -1).all() and (state[AdapterKey(0, "q", "A")] == 2).all()
    assert norm({AdapterKey(0, "q", "A"): np.full(4, 1e30, "f4")}) == pytest.approx(2e30), "in float64"


def test_lora_settings_name_their_first_difference() -> None:
    assert LoraSpec(8).difference(LoraSpec(8)) is None
    assert LoraSpec(8).difference(LoraSpec(4, dropout=0.1)) == "rank 8 against 4"
