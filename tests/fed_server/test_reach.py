from __future__ import annotations

from pathlib import Path

from sfl.adapters.state import device_half, edge_half
from sfl.fed_server.reach import Reach
from tests.fed_server.made import Clock, adapter, device, half, started, submit


def test_a_device_that_is_long_overdue_cannot_be_reached_until_it_uploads_again() -> None:
    clock = Clock()
    reach = Reach(3.0, clock)
    for _ in range(4):
        reach.uploaded("a", 0)
        clock.now += 10
    clock.now += 19
    assert reach.unreachable(["a", "b"]) == set(), "29 s where 10 are usual; of b nothing is known"
    clock.now += 2
    assert reach.unreachable(["a", "b"]) == {"a"} and reach.unreachable(["b"]) == set()
    reach.uploaded("a", 0)
    assert reach.unreachable(["a"]) == set()


def test_a_device_is_waited_for_until_it_has_uploaded_twice_and_for_ever_with_0() -> None:
    clock = Clock()
    reach, patient = Reach(3.0, clock), Reach(0.0, clock)
    reach.uploaded("a", 0)
    for _ in range(2):
        patient.uploaded("a", 0)
        clock.now += 1
    clock.now += 1e6
    assert reach.unreachable(["a"]) == set() and patient.unreachable(["a"]) == set()
    reach.uploaded("a", 0)
    reach.forget("a")
    clock.now += 1e9
    assert reach.unreachable(["a"]) == set(), "it has joined anew"


def test_a_device_whose_transfers_fail_cannot_be_reached_until_one_goes_through() -> None:
    reach = Reach(3.0, Clock())
    for failures, lost in ((0, False), (2, True), (1, True), (0, False), (4, True)):
        reach.uploaded("a", failures)
        assert bool(reach.unreachable(["a"])) is lost, failures


def test_an_upload_whose_answer_was_lost_is_one_that_failed(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], Clock(), strategy={"quorum": 1.0, "reach": True})
    for name in "ab":
        submit(fed, name, adapter(1))
    fed.submit(half("device", "b", failures=1), device_half(adapter(1), 1))
    submit(fed, "a", adapter(1), "2", 1)
    assert fed.version == 2


def test_the_quorum_adapts_to_who_is_reachable_if_the_strategy_looks(tmp_path: Path) -> None:
    versions = {}
    for reach in (True, False):
        clock = Clock()
        strategy = {"quorum": 1.0, "reach": reach, "network": not reach}
        members = [device("a"), device("b")]
        fed = started(tmp_path / str(reach), members, clock, strategy=strategy)
        for number in range(3):
            clock.now += 10
            for name in "ab":
                submit(fed, name, adapter(1), str(number), number)
        assert fed.version == 3
        submit(fed, "a", adapter(1), "more", 3)
        clock.now += 29
        fed.tick()
        assert fed.version == 3
        clock.now += 2
        fed.tick()
        versions[reach] = fed.version
    assert versions == {True: 4, False: 3}


def test_a_link_that_fails_takes_its_device_out_of_the_quorum(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a"), device("b")], Clock(), strategy={"quorum": 1.0, "reach": True})
    for name in "ab":
        fed.submit(half("edge", name), edge_half(adapter(1), 1))
        fed.submit(half("device", name, failures=1 if name == "b" else 0), device_half(adapter(1), 1))
    assert fed.version == 1
    submit(fed, "a", adapter(1), "2", 1)
    assert fed.version == 2, "b's last upload had to be sent again"
