"""Pictures: which are drawn, and what a mean over seeds is."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from sfl.compare.plots import averaged, draw
from tests.compare.made import outcome


def test_curves_are_averaged_where_all_of_them_are() -> None:
    places, middle, least, greatest = averaged([[0, 10], [0, 5, 20]], [[0.0, 1.0], [1.0, 0.5, 0.5]])
    assert places[0] == 0 and places[-1] == 10
    np.testing.assert_allclose([middle[0], least[0], greatest[0]], [0.5, 0.0, 1.0])
    np.testing.assert_allclose([middle[-1], least[-1], greatest[-1]], [0.75, 0.5, 1.0])


def test_a_picture_for_each_axis_that_has_something_to_show(tmp_path: Path) -> None:
    central = outcome(0.95, fed_received=None, fed_sent=None, strategy="centralised")
    drawn = draw(tmp_path, {"centralised": {0: central}}, "title")
    assert [path.name for path in drawn] == ["accuracy_over_steps.png"]
    by_cut = {}
    for cut in (1, 2):
        devices = tuple(dataclasses.replace(device, cut=cut) for device in outcome().devices)
        by_cut[f"cut {cut}"] = {seed: outcome(0.9 - seed / 10, devices=devices) for seed in range(2)}
    drawn = draw(tmp_path, {**by_cut, "centralised": {0: central}}, "a title that is long enough to be broken " * 5)
    names = ["accuracy_over_bytes.png", "accuracy_over_steps.png", "accuracy_over_time.png", "accuracy_over_cut.png"]
    assert [path.name for path in drawn] == names
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)
    assert draw(tmp_path, {"no curve": {0: outcome(curve=())}}, "title") == []
