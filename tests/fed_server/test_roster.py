"""Who takes part, for a server that is started anew: whom it waits for, whom it knows, and when a run has ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfl.adapters.state import device_half, edge_half
from sfl.errors import FinishedError, NameTakenError, RefusedError, StateError, StateWriteError, UnknownMemberError
from sfl.fed_server import ledger, roster_file
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.members import Member
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import PLACEMENT, Clock, adapter, device, edge, half, submit

EVERYBODY = {"strategy": {"name": "gsfs", "quorum": 1.0}}


def server(out: Path, clock: Clock, devices: int = 2, **settings: Any) -> Federation:
    """A server of `out`, the one before having been killed if there was one."""
    fed = Federation(
        FedSettings.model_validate({"devices": devices, **EVERYBODY, **settings}),
        VersionStore(out / "adapters"),
        MetricsWriter(None),
        clock,
        out,
    )
    fed._ledger._file.close()  # it is not locked any more; nothing is written but by the last server
    fed._ledger._file = (out / ledger.FILE).open("ab", buffering=0)
    return fed


def begun(out: Path, clock: Clock, *members: Member, **settings: Any) -> Federation:
    fed = server(out, clock, len(members), **settings)
    for member in (*members, edge()):
        fed.join(member)
        fed.watch_begins(member.name)
    fed.propose("edge", PLACEMENT, adapter(0))
    return fed


def test_nobody_waits_for_who_had_left_and_everybody_for_who_had_not(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, device("a"), device("b"), device("c"))
    fed.leave("c")
    again = server(tmp_path, clock, 3)
    assert again.joined == 3 and again.agreement is not None
    submit(again, "a", adapter(1), "s/1")
    assert again.version == 0, "b is expected back"
    submit(again, "b", adapter(2), "s/1")
    assert again.version == 1, "c had left"
    for name in "ab":
        again.leave(name)
    assert again.finished


def test_who_does_not_come_back_is_away_after_a_while(tmp_path: Path) -> None:
    clock = Clock()
    begun(tmp_path, clock, device("a"), device("b"), away_after_s=60)
    again = server(tmp_path, clock, away_after_s=60)
    again.watch_begins("a")
    submit(again, "a", adapter(1), "s/1")
    clock.now += 59
    again.tick()
    assert again.version == 0
    clock.now += 2
    again.tick()
    assert again.version == 1
    again.watch_begins("b")
    submit(again, "a", adapter(1), "s/2", 1)
    assert again.version == 1, "it is back"


def test_members_go_on_without_joining_again_and_are_who_they_were(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, device("a", cut=2, rank=1, examples=30, edge="edge"), device("b"))
    policy = fed.policy("a")
    again = server(tmp_path, clock)
    assert again.policy("a") == policy and again.serves("a", "edge") is True and again.serves("a", "other") is False
    assert {key.layer for key in again.fetch("a", 0, 0, 2)} == {0, 1}
    again.watch_begins("edge")
    with pytest.raises(UnknownMemberError):
        again.watch_begins("nobody")


def offsets(fed: Federation) -> list[list[float]]:
    return [list(fed.policy(name).logit_offsets) for name in "ab"]


def test_policies_after_a_restart_are_those_before_it_from_the_first_moment_on(tmp_path: Path) -> None:
    clock = Clock()
    fed = server(tmp_path, clock)
    fed.join(device("a", examples=30, label_counts=(29, 1)))
    half_way = server(tmp_path, clock)
    half_way.join(edge())
    half_way.join(device("b", label_counts=(1, 9)))
    assert [] not in offsets(half_way)
    policies = [half_way.policy(name) for name in "ab"]
    again = server(tmp_path, clock)
    assert [again.policy(name) for name in "ab"] == policies, "before version 0"
    again.propose("edge", PLACEMENT, adapter(0))
    later = server(tmp_path, clock)
    assert [later.policy(name) for name in "ab"] == policies, "with the agreement of the version"
    later.join(device("a", examples=30, label_counts=(29, 1)))
    assert [later.policy(name) for name in "ab"] == policies


def test_that_the_time_to_join_was_over_outlives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the clock on the wall says by then, and however many devices the settings expect."""
    clock = Clock()
    monkeypatch.setattr("sfl.fed_server.roster_file.time.time", lambda: 1e6 - clock.now)
    settings = {"labels": ("benign", "scan"), "join_wait_s": 300}
    fed = server(tmp_path, clock, 3, **settings)
    for member in (edge(), device("a", label_counts=(9, 1)), device("b", label_counts=(1, 9))):
        fed.join(member)
    assert offsets(fed) == [[], []]
    clock.now += 301
    fed.tick()
    policies = [fed.policy(name) for name in "ab"]
    assert [] not in offsets(fed)
    again = server(tmp_path, clock, 4, **settings)
    again.watch_begins("a")
    again.join(device("b", label_counts=(1, 9)))
    assert [again.policy(name) for name in "ab"] == policies
    again.join(device("c", label_counts=(10, 0)))
    assert again.policy("a") != policies[0], "who comes late counts from then on"


def test_another_run_begins_without_policies_of_the_last(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, device("a", label_counts=(9, 1)), device("b", label_counts=(1, 9)))
    for name in "ab":
        fed.leave(name)
    again = server(tmp_path, clock)
    again.join(device("a", label_counts=(9, 1)))
    assert not again.policy("a").logit_offsets
    again.join(device("b", label_counts=(9, 1)))
    assert again.policy("a") == again.policy("b") and offsets(again)[0] == pytest.approx([0, 0])


def test_before_version_0_the_agreement_is_that_of_the_same_devices(tmp_path: Path) -> None:
    clock = Clock()
    fed = server(tmp_path, clock)
    fed.join(device("a", labels=("scan",)))
    half_way = server(tmp_path, clock)
    assert half_way.agreement is None and half_way.joined == 1
    half_way.join(device("b", labels=("benign", "flood")))
    again = server(tmp_path, clock)
    assert again.agreement == half_way.agreement is not None and again.id == fed.id
    again.join(edge())
    assert again.propose("edge", PLACEMENT, adapter(0))
    assert server(tmp_path, clock).propose("edge", PLACEMENT, adapter(0)), "an answer that was lost is given again"


def test_other_settings_may_be_given_to_a_device_that_the_server_has_not_heard_of_since_its_start(tmp_path: Path) -> None:
    clock = Clock()
    begun(tmp_path, clock, device("a"), device("b"))
    again = server(tmp_path, clock)
    again.watch_begins("b")
    again.join(device("a", cut=2))
    with pytest.raises(NameTakenError, match=r"has that name"):
        again.join(device("b", cut=2))


def test_a_device_whose_model_lies_elsewhere_now_is_the_same_device(tmp_path: Path) -> None:
    """It moved to another machine, or to another user's cache."""
    fed = begun(tmp_path, Clock(), device("a", base_model="/home/old/model"))
    fed.join(device("a", base_model="/home/new/model"))
    assert fed.joined == 1
    with pytest.raises(NameTakenError, match=r"has that name"):
        fed.join(device("a", base_model="/home/new/model", examples=11))


def test_devices_that_have_yet_to_join_are_expected_for_what_is_left_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("sfl.fed_server.roster_file.time.time", clock)
    settings = {"labels": ("benign", "scan"), "join_wait_s": 300}
    fed = server(tmp_path, clock, 3, **settings)
    for member in (edge(), device("a")):
        fed.join(member)
    fed.propose("edge", PLACEMENT, adapter(0))
    clock.now += 200
    again = server(tmp_path, clock, 3, **settings)
    again.watch_begins("a")
    submit(again, "a", adapter(1), "s/1")
    clock.now += 99
    again.tick()
    assert again.version == 0
    clock.now += 2
    again.tick()
    assert again.version == 1


def test_what_is_known_of_devices_reach_is_known_again(tmp_path: Path) -> None:
    clock, settings = Clock(), {"strategy": {"name": "gsfs", "quorum": 1.0, "reach": True}}
    fed = begun(tmp_path, clock, device("a"), device("b"), **settings)
    fed.submit(half("edge", "b", "s/1"), edge_half(adapter(1), 1))
    fed.submit(half("device", "b", "s/1", failures=1), device_half(adapter(1), 1))
    again = server(tmp_path, clock, **settings)
    again.tick()
    submit(again, "a", adapter(1), "s/1")
    assert again.version == 1
    submit(again, "a", adapter(1), "s/2", 1)
    assert again.version == 2, "b's last upload had to be sent again"


# The end of a run


def test_a_device_that_evaluates_is_not_waited_for_but_the_end_is(tmp_path: Path) -> None:
    fed = begun(tmp_path, Clock(), device("a"), device("b"), strategy={"name": "fedavg"})
    submit(fed, "a", adapter(1), "s/1")
    fed.submit(half("device", "b", "s/1"), device_half(adapter(2), 1))
    fed.trained("b")
    assert fed.version == 0, "its other half is on the way"
    fed.submit(half("edge", "b", "s/1"), edge_half(adapter(2), 1))
    assert fed.version == 1
    submit(fed, "a", adapter(1), "s/2", 1)
    assert fed.version == 2, "b has done its steps"
    fed.leave("a")
    assert not fed.finished, "b evaluates"
    fed.leave("b")
    assert fed.finished


def test_the_last_update_of_all_counts_though_they_evaluate(tmp_path: Path) -> None:
    fed = begun(tmp_path, Clock(), device("a"), device("b"), strategy={"name": "fedavg"})
    fed.trained("a")
    fed.submit(half("device", "b", "s/1"), device_half(adapter(2), 1))
    fed.trained("b")
    fed.submit(half("edge", "b", "s/1"), edge_half(adapter(2), 1))
    assert fed.version == 1
    fed.join(device("a"))
    submit(fed, "b", adapter(2), "s/2", 1)
    assert fed.version == 1, "a device that joins again trains again"


def test_that_a_device_evaluates_or_has_left_outlives_the_server(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, device("a"), device("b"), strategy={"name": "fedavg"})
    fed.trained("b")
    again = server(tmp_path, clock, strategy={"name": "fedavg"})
    submit(again, "a", adapter(1), "s/1")
    assert again.version == 1
    again.leave("a")
    third = server(tmp_path, clock, strategy={"name": "fedavg"})
    third.tick()
    assert not third.finished
    third.leave("b")
    assert third.finished


def test_a_finished_run_stays_so_until_a_device_begins_another_at_a_server_that_was_started_anew(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, device("a"))
    submit(fed, "a", adapter(1), "s/1")
    fed.leave("a")
    assert fed.finished
    with pytest.raises(FinishedError, match=r"start its server again"):
        fed.join(device("a"))
    again = server(tmp_path, clock, 1)
    assert again.finished
    again.watch_begins("a")  # it may have lost the answer
    again.leave("a")
    again.watch_begins("edge")
    with pytest.raises(RefusedError, match=r"after the federation had finished"):
        submit(again, "a", adapter(1), "s/2", 1)
    with pytest.raises(RefusedError, match=r"fingerprint"):
        again.join(device("new", model_fingerprint="other"))
    assert again.finished
    again.join(device("new", cut=2))
    assert not again.finished and again.version == 1
    submit(again, "new", adapter(1), "t/1", 1, cut=2)
    assert again.version == 2
    again.leave("new")
    assert again.finished and ledger.check(tmp_path) == ledger.Balance(accepted=2, counted=2)


def test_an_edge_server_that_a_device_has_left_long_ago_serves_it_no_more(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, device("a"))
    for number in range(20):
        fed.join(device("a", edge=f"edge-{number}"))
    fed.join(device("a"))  # before it has opened its next session
    for each in (fed, server(tmp_path, clock)):
        assert [each.serves("a", f"edge-{number}") for number in (0, 17, 18, 19)] == [False, False, True, True]
    assert (tmp_path / roster_file.FILE).stat().st_size < 3000
    fed.join(device("a", edge="edge-18"))
    fed.join(device("a", edge="edge-3"))
    assert [fed.serves("a", f"edge-{number}") for number in (3, 18, 19)] == [True, True, False]


# Files


def test_a_damaged_roster_is_named(tmp_path: Path) -> None:
    clock = Clock()
    begun(tmp_path, clock, device("a"))
    path = tmp_path / roster_file.FILE
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StateError, match=r"roster.state is damaged.*delete it"):
        server(tmp_path, clock, 1)


def test_without_its_roster_a_server_waits_for_the_devices_whose_updates_it_has(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, device("a"), device("b"))
    submit(fed, "a", adapter(1), "s/1")
    (tmp_path / roster_file.FILE).unlink()
    again = server(tmp_path, clock, join_wait_s=10)
    again.join(edge())
    again.join(device("b"))
    clock.now += 11
    submit(again, "b", adapter(2), "s/1")
    assert again.version == 1 and again.pooled() == ["a"]
    again.join(device("a"))
    submit(again, "b", adapter(2), "s/2", 1)
    assert again.version == 2 and ledger.check(tmp_path).problems == []


def test_on_a_full_disk_members_join_and_none_leaves_unnoticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise StateWriteError("no space left")

    clock = Clock()
    fed = begun(tmp_path, clock, device("a"), device("b"))
    monkeypatch.setattr(roster_file, "write_state", full)
    fed.join(edge("other"))
    for say in (fed.leave, fed.trained):
        with pytest.raises(StateWriteError):
            say("a")
    fed.tick()
    assert "other" not in server(tmp_path, clock).edges()
    monkeypatch.undo()
    fed.tick()
    assert "other" in server(tmp_path, clock).edges()


def test_a_device_too_many_is_told_what_to_do_about_those_of_an_earlier_server(tmp_path: Path) -> None:
    clock = Clock()
    begun(tmp_path, clock, device("a"))
    with pytest.raises(RefusedError, match=r"the 1 expected devices are a; raise `devices`.*or give it another `out`"):
        server(tmp_path, clock, 1).join(device("b"))
