from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sfl.adapters.state import AdapterKey, AdapterState, device_half, edge_half
from sfl.errors import AdapterError, RefusedError
from tests.fed_server.made import Clock, adapter, device, edge, federation, half, same, started, submit


def of_rank(state: AdapterState, rank: int) -> AdapterState:
    parts = {"A": lambda value: value[:rank], "B": lambda value: value[:, :rank]}
    return {key: parts.get(key.part, lambda value: value)(value) for key, value in state.items()}


def test_devices_of_different_ranks_get_and_send_their_own(tmp_path: Path) -> None:
    members = [device("a", rank=1), device("b", cut=2)]
    fed = started(tmp_path, members, strategy={"name": "fedavg"})
    assert same(fed.fetch("a", 0, rank=1), of_rank(adapter(0), 1)) and same(fed.fetch("b", 0), adapter(0))
    assert same(fed.fetch("edge", 0, 1, rank=1), edge_half(of_rank(adapter(0), 1), 1))
    with pytest.raises(AdapterError, match=r"shape \(2, 3\), expected \(1, 3\)"):
        submit(fed, "a", adapter(1))
    submit(fed, "a", of_rank(adapter(1), 1), "2")
    submit(fed, "b", adapter(2), cut=2)
    result = fed.fetch("b", 1)
    small, key = of_rank(adapter(1), 1), AdapterKey(0, "q", "A")
    np.testing.assert_allclose(result[key][:1], adapter(0)[key][:1] + 0.5 * small[key] + 0.5 * adapter(2)[key][:1], rtol=1e-5)
    np.testing.assert_allclose(result[key][1:], adapter(0)[key][1:] + 0.5 * adapter(2)[key][1:], rtol=1e-5)
    with pytest.raises(RefusedError, match="no device can have rank 3"):
        fed.fetch("b", 0, rank=3)


def test_a_rank_above_that_of_the_settings_is_refused(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2)
    with pytest.raises(RefusedError, match=r"rank 3 is above the 2 of the LoRA settings.*`lora.rank`"):
        fed.join(device("a", rank=3))


def test_what_needs_one_rank_refuses_others(tmp_path: Path) -> None:
    shared = federation(tmp_path, 2, strategy={"name": "splitlora"})
    shared.join(device("a", rank=2))
    with pytest.raises(RefusedError, match=r"has rank 1 and the others 2.* strategy needs one rank"):
        shared.join(device("c", rank=1))


def test_an_adapter_that_all_devices_share_at_the_edge_has_one_edge_server(tmp_path: Path) -> None:
    clock = Clock()
    shared, any_number = federation(tmp_path, 2, clock, strategy={"name": "splitlora"}), federation(tmp_path, 2, clock)
    for fed in (shared, any_number):
        fed.join(edge("first"))
        fed.join(edge("first"))
        fed.join(device("a"))
    any_number.join(edge("second"))
    with pytest.raises(RefusedError, match=r"'second' cannot join: edge server 'first' is there.* one adapter at the edge"):
        shared.join(edge("second"))
    clock.now += 61
    shared.join(edge("second"))


def test_a_device_that_comes_back_with_another_rank_leaves_its_halves_behind(tmp_path: Path) -> None:
    clock = Clock()
    fed = started(tmp_path, [device("a"), device("b")], clock, strategy={"quorum": 1.0})
    submit(fed, "a", adapter(1), "1")
    fed.submit(half("edge", "a", "2"), edge_half(adapter(1), 1))
    fed.watch_ends("a")
    clock.now += 61
    fed.join(device("a", rank=1))
    fed.submit(half("device", "a", "2"), device_half(of_rank(adapter(1), 1), 1))
    submit(fed, "a", of_rank(adapter(1), 1), "3")
    submit(fed, "b", adapter(2))
    assert fed.version == 1, "what it sent at rank 2 is in it"
    submit(fed, "b", adapter(2), "2", version=1)
    assert fed.version == 2, "and what it sent at rank 1 in the next"


def test_under_ffa_updates_have_no_a(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")], merge="ffa")
    with pytest.raises(AdapterError, match="0/q/A is unknown"):
        submit(fed, "a", adapter(1))
    submit(fed, "a", {key: value for key, value in adapter(1).items() if key.part != "A"}, "2")
    for key, value in fed.fetch("a", 1).items():
        expected = adapter(0)[key] + (0 if key.part == "A" else adapter(1)[key])
        np.testing.assert_allclose(value, expected, rtol=1e-5)


@pytest.mark.parametrize("merge", ["fedex", "flora", "flexlora"])
def test_every_merge_makes_versions_that_a_restarted_server_goes_on_from(tmp_path: Path, merge: str) -> None:
    members = [device("a"), device("b", rank=1)]
    fed = started(tmp_path, members, strategy={"name": "fedavg"}, merge=merge)
    for version in range(2):
        submit(fed, "a", adapter(version + 1), str(version), version)
        submit(fed, "b", of_rank(adapter(version + 5), 1), str(version), version)
    again = federation(tmp_path, 2, strategy={"name": "fedavg"}, merge=merge)
    for member in [*members, edge()]:
        again.join(member)
    assert again.version == 2 and same(again.fetch("b", 2, rank=1), fed.fetch("b", 2, rank=1))
    frozen = [key for key in again.fetch("a", 2) if key.part == "frozen_A"]
    assert bool(frozen) == (merge != "flexlora")


def test_where_versions_have_factors_of_their_own_a_devices_updates_of_two_are_not_mixed(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], strategy={"quorum": 1.0}, merge="flora")
    for name in "ab":
        submit(fed, name, adapter(1))
    submit(fed, "a", adapter(1), "late", version=0)
    submit(fed, "a", adapter(1), "new", version=1)
    submit(fed, "b", adapter(1), "2", version=1)
    assert fed.version == 2
    submit(fed, "b", adapter(1), "3", version=2)
    assert fed.version == 3 and fed.submissions == 6
