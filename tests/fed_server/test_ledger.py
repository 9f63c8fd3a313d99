"""The ledger: what it tells, what outlives a killed server, and what `check` finds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sfl.adapters.state import device_half, edge_half
from sfl.errors import StateDiffersError, StateError, StateInUseError, StateWriteError
from sfl.fed_server import ledger
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.versions import VersionStore
from sfl.settings import FedSettings
from sfl.telemetry import MetricsWriter
from tests.fed_server.made import PLACEMENT, Clock, adapter, device, edge, half, no_file_above, submit


def server(out: Path, clock: Clock | None = None, adapters: Path | None = None, **settings: Any) -> Federation:
    defaults = {"devices": 2, "strategy": {"name": "gsfs", "quorum": 1.0}}
    store = VersionStore(adapters or out / "adapters")
    return Federation(FedSettings.model_validate(defaults | settings), store, MetricsWriter(None), clock or Clock(), out)


def begun(out: Path, clock: Clock | None = None, **settings: Any) -> Federation:
    """With version 0, and the devices a and b."""
    fed = server(out, clock, **settings)
    for member in (device("a"), device("b"), edge()):
        fed.join(member)
        fed.watch_begins(member.name)
    fed.propose("edge", PLACEMENT, adapter(0))
    return fed


def lines(out: Path, event: str | None = None) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / ledger.FILE).read_text().splitlines()]
    return [line for line in found if event in (None, line["event"])]


def keys(out: Path, event: str) -> list[tuple[str, str]]:
    return [(line["device"], line["submission"]) for line in lines(out, event)]


def test_it_tells_what_was_accepted_and_what_became_of_it(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, half_expires_s=600)
    fed.submit(half("edge", "a", "s/1"), edge_half(adapter(1), 1))
    assert keys(tmp_path, "accepted") == []
    fed.submit(half("device", "a", "s/1", examples=16, steps=2), device_half(adapter(1), 1))
    submit(fed, "a", adapter(1), "s/2")
    submit(fed, "b", adapter(2), "s/1")
    assert [line["event"] for line in lines(tmp_path)] == ["begin", "version", "accepted", "accepted", "accepted", "version"]
    first = lines(tmp_path, "accepted")[0]
    assert (first["device"], first["submission"], first["version"], first["examples"], first["steps"]) == ("a", "s/1", 0, 16, 2)
    assert lines(tmp_path, "version")[1]["submissions"] == [["a", "s/1"], ["a", "s/2"], ["b", "s/1"]]
    fed.submit(half("device", "b", "s/2"), device_half(adapter(2), 1))
    clock.now += 601
    fed.tick()
    assert lines(tmp_path, "dropped")[0]["reason"] == "only its device half came"
    fed.leave("a")
    fed.leave("b")
    assert lines(tmp_path)[-1] == {"event": "finished", "version": 1, "time": lines(tmp_path)[-1]["time"]}
    assert ledger.check(tmp_path) == ledger.Balance(accepted=3, counted=3)


def test_what_a_version_did_not_count_is_told_with_the_reason(tmp_path: Path) -> None:
    fed = begun(tmp_path)
    submit(fed, "a", adapter(1), "s/1")
    fed.submit(half("device", "b", "s/1"), device_half(adapter(2), 1))
    next((tmp_path / "pool").glob("00000003-*")).write_bytes(b"the disk is failing")
    fed.submit(half("edge", "b", "s/1"), edge_half(adapter(2), 1))
    told = lines(tmp_path, "version")[1]
    assert told["submissions"] == [["a", "s/1"], ["b", "s/1"]] and "cannot be read" in told["refused"]["b"]
    assert ledger.check(tmp_path) == ledger.Balance(accepted=2, counted=1, refused=1)


def test_what_made_no_version_is_told_and_never_taken_again(tmp_path: Path) -> None:
    strategy = {"name": "gsfs", "quorum": 0.5}
    fed = begun(tmp_path, strategy=strategy)
    fed.submit(half("device", "a", "s/1"), device_half(adapter(1), 1))
    next((tmp_path / "pool").glob("*-device*")).write_bytes(b"the disk is failing")
    fed.submit(half("edge", "a", "s/1"), edge_half(adapter(1), 1))
    (dropped,) = lines(tmp_path, "dropped")
    assert (dropped["device"], dropped["submission"]) == ("a", "s/1") and "cannot be read" in dropped["reason"]
    assert fed.version == 0 and ledger.check(tmp_path) == ledger.Balance(accepted=1, dropped=1)
    fed.close()
    again = server(tmp_path, strategy=strategy)
    submit(again, "a", adapter(1), "s/1")
    assert again.version == 0 and again.submissions == 1
    submit(again, "a", adapter(1), "s/2")
    assert again.version == 1 and ledger.check(tmp_path) == ledger.Balance(accepted=2, counted=1, dropped=1)


def test_what_was_in_a_version_that_is_removed_is_never_taken_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": {"name": "gsfs", "quorum": 0.5}, "keep_versions": 1}
    fed = begun(tmp_path, **settings)
    for number in range(4):
        submit(fed, "a", adapter(1), f"s/{number + 1}", number)
    submit(fed, "b", adapter(1), "s/1")
    assert [(line["version"], line["submissions"]) for line in lines(tmp_path, "removed")] == [
        (number, [["a", f"s/{number}"]]) for number in range(1, 5)
    ]
    fed.close()
    again = server(tmp_path, **settings)
    assert again.submissions == 5 and not lines(tmp_path, "dropped"), "nothing is missed"
    for number in range(4):
        submit(again, "a", adapter(1), f"s/{number + 1}", number)
    assert again.version == 5 and again.submissions == 5
    assert ledger.check(tmp_path) == ledger.Balance(accepted=5, counted=5)


def test_a_version_from_before_the_ledger_is_told_of_when_it_is_removed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": {"name": "gsfs", "quorum": 0.5}, "keep_versions": 1}
    fed = begun(tmp_path, **settings | {"keep_versions": 0})
    for number in range(3):
        submit(fed, "a", adapter(1), f"s/{number + 1}", number)
    fed.close()
    (tmp_path / ledger.FILE).unlink()
    again = server(tmp_path, **settings)
    submit(again, "a", adapter(1), "s/4", 3)
    assert {line["version"] for line in lines(tmp_path, "removed")} == {1, 2}, "version 3 is the newest that a may have fetched"
    again.close()
    third = server(tmp_path, **settings)
    submit(third, "a", adapter(1), "s/1")
    assert third.version == 4 and third.submissions == 4
    assert ledger.check(tmp_path) == ledger.Balance(accepted=1, counted=1)


def test_a_version_stays_while_the_ledger_cannot_tell_that_it_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*arguments: Any) -> None:
        raise StateWriteError("no room")

    fed = begun(tmp_path, strategy={"name": "gsfs", "quorum": 0.5}, keep_versions=1)
    submit(fed, "a", adapter(1), "s/1")
    with monkeypatch.context() as patch:
        patch.setattr(ledger.Ledger, "removed", full)
        submit(fed, "a", adapter(1), "s/2", 1)
    assert "no room" in caplog.text and (tmp_path / "adapters" / "v1").is_dir()
    submit(fed, "a", adapter(1), "s/3", 2)
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {"v0", "v3"}


def test_what_came_whole_after_a_half_of_it_had_expired_counts_at_the_next_server_too(tmp_path: Path) -> None:
    clock = Clock()
    fed = begun(tmp_path, clock, half_expires_s=600, strategy={"name": "gsfs", "quorum": 1.0})
    fed.submit(half("device", "a", "s/1"), device_half(adapter(1), 1))
    clock.now += 601
    fed.tick()
    submit(fed, "a", adapter(1), "s/1")
    assert keys(tmp_path, "dropped") == keys(tmp_path, "accepted") == [("a", "s/1")]
    fed.close()
    again = server(tmp_path, strategy={"name": "gsfs", "quorum": 1.0})
    assert again.pooled() == ["a"] and ledger.check(tmp_path) == ledger.Balance(accepted=1, pooled=1, dropped=1)


def test_what_is_left_out_at_the_end_and_what_is_too_old_is_told(tmp_path: Path) -> None:
    strategy = {"name": "gsfs-printed", "quorum": 1.0, "max_lag": 1}
    clock = Clock()
    fed = begun(tmp_path, clock, strategy=strategy)
    for number in range(2):
        for name in "ab":
            submit(fed, name, adapter(1), f"s/{number + 1}", number)
    submit(fed, "a", adapter(1), "s/3", 0)
    submit(fed, "a", adapter(1), "s/4", 2)
    for name in "ab":
        fed.watch_ends(name)
    clock.now += 61
    fed.leave("b")
    assert fed.finished and fed.version == 2
    reasons = {line["submission"]: line["reason"] for line in lines(tmp_path, "dropped")}
    assert "strategy.max_lag is 1" in reasons["s/3"] and "left out" in reasons["s/4"]
    assert ledger.check(tmp_path) == ledger.Balance(accepted=5, counted=4, dropped=1)
    assert not list((tmp_path / "pool").iterdir())


def test_a_line_that_was_not_written_to_its_end_is_cut_off(tmp_path: Path) -> None:
    fed = begun(tmp_path)
    submit(fed, "a", adapter(1), "s/1")
    fed.close()
    path = tmp_path / ledger.FILE
    path.write_bytes(path.read_bytes()[:-5])
    (problem,) = ledger.check(tmp_path).problems
    assert problem == "submission s/1 of device 'a' is in the ledger 0 times, and in versions and pool 1 times"
    again = server(tmp_path)
    assert keys(tmp_path, "accepted") == [("a", "s/1")] and ledger.check(tmp_path).problems == []
    assert again.submissions == 1


def test_a_ledger_that_was_moved_away_is_begun_anew_with_what_there_is(tmp_path: Path) -> None:
    fed = begun(tmp_path)
    for name in "ab":
        submit(fed, name, adapter(1), "s/1")
    submit(fed, "a", adapter(1), "s/2", 1)
    fed.close()
    (tmp_path / ledger.FILE).unlink()
    again = server(tmp_path)
    assert again.id == fed.id and lines(tmp_path)[0]["version"] == 1 and keys(tmp_path, "accepted") == [("a", "s/2")]
    assert ledger.check(tmp_path) == ledger.Balance(accepted=1, pooled=1)


def test_what_was_accepted_and_is_gone_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fed = begun(tmp_path)
    submit(fed, "a", adapter(1), "s/1")
    fed.close()
    shutil.rmtree(tmp_path / "pool")
    server(tmp_path)
    assert "submission s/1 of device 'a' was accepted, and its files are gone" in caplog.text
    assert [line["reason"] for line in lines(tmp_path, "dropped")] == ["its files are gone or damaged"]
    assert ledger.check(tmp_path) == ledger.Balance(accepted=1, dropped=1)


def test_after_a_step_back_to_an_earlier_version_updates_of_later_ones_are_left_out(tmp_path: Path) -> None:
    fed = begun(tmp_path)
    for name in "ab":
        submit(fed, name, adapter(1), "s/1")
    submit(fed, "a", adapter(1), "s/2", version=1)
    submit(fed, "a", adapter(1), "late", version=0)
    fed.close()
    shutil.rmtree(tmp_path / "adapters" / "v1")
    again = server(tmp_path)
    again.tick()
    assert again.version == 0 and again.pooled() == ["a"]
    assert sorted(keys(tmp_path, "dropped")) == [("a", "s/1"), ("a", "s/2"), ("b", "s/1")]
    submit(again, "b", adapter(1), "t/1")
    assert again.version == 1
    assert ledger.check(tmp_path) == ledger.Balance(accepted=5, counted=2, dropped=3)


def test_a_full_disk_accepts_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = begun(tmp_path)
    fed.submit(half("edge", "a", "s/1"), edge_half(adapter(1), 1))
    size = (tmp_path / ledger.FILE).stat().st_size
    monkeypatch.setattr(ledger.Ledger, "_append", _full(ledger.Ledger._append, tmp_path, size + 20))
    with pytest.raises(StateWriteError, match=r"submissions.jsonl.*File too large"):
        fed.submit(half("device", "a", "s/1"), device_half(adapter(1), 1))
    assert fed.refused == 0 and fed.submissions == 0 and len(list((tmp_path / "pool").iterdir())) == 1
    monkeypatch.undo()
    fed.submit(half("device", "a", "s/1"), device_half(adapter(1), 1))
    assert keys(tmp_path, "accepted") == [("a", "s/1")] and ledger.check(tmp_path).problems == []


def test_a_version_is_told_once_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fed = begun(tmp_path)
    submit(fed, "a", adapter(1), "s/1")
    fed.submit(half("edge", "b", "s/1"), edge_half(adapter(2), 1))
    real = ledger.Ledger._append
    calls: list[int] = []

    def append(self: ledger.Ledger, added: Any) -> None:
        calls.append(1)
        (real if len(calls) == 1 else _full(real, tmp_path, 10))(self, added)

    monkeypatch.setattr(ledger.Ledger, "_append", append)
    fed.submit(half("device", "b", "s/1"), device_half(adapter(2), 1))
    assert fed.version == 1 and [line["version"] for line in lines(tmp_path, "version")] == [0]
    assert ledger.check(tmp_path).problems == [], "its line may come later than the newest version"
    monkeypatch.undo()
    fed.tick()
    assert [line["version"] for line in lines(tmp_path, "version")] == [0, 1]


def _full(append: Callable[..., None], out: Path, size: int) -> Callable[..., None]:
    def on_a_full_disk(self: ledger.Ledger, added: Any) -> None:
        with no_file_above(size):
            append(self, added)

    return on_a_full_disk


def test_two_servers_cannot_have_one_folder(tmp_path: Path) -> None:
    fed = server(tmp_path)
    with pytest.raises(StateInUseError, match=rf"another federation server works in {tmp_path}: choose another `out`"):
        server(tmp_path)
    fed.close()
    server(tmp_path)


@pytest.mark.parametrize("line", ["no JSON", "[1]", '{"event": "accepted"}', '{"no": "event"}'])
def test_a_damaged_ledger_is_named(tmp_path: Path, line: str) -> None:
    begun(tmp_path).close()
    path = tmp_path / ledger.FILE
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(StateError, match=r"submissions.jsonl is damaged .*: restore it from a backup, or move it away"):
        server(tmp_path)


def test_a_ledger_of_another_federation_is_refused(tmp_path: Path) -> None:
    begun(tmp_path / "one").close()
    begun(tmp_path / "two").close()
    with pytest.raises(StateDiffersError, match=r"another federation than the one whose versions are in .*two"):
        server(tmp_path / "one", adapters=tmp_path / "two" / "adapters")
    with pytest.raises(StateDiffersError, match=r"tells of versions, and .*none has none: name the folder"):
        server(tmp_path / "one", adapters=tmp_path / "none")
    fresh = server(tmp_path / "three", adapters=tmp_path / "two" / "adapters")
    assert fresh.version == 0
    assert fresh.id == lines(tmp_path / "two")[0]["federation"] == lines(tmp_path / "three")[0]["federation"]


def test_versions_of_an_earlier_release_can_be_gone_on_from(tmp_path: Path) -> None:
    fed = begun(tmp_path / "old")
    for name in "ab":
        submit(fed, name, adapter(1), "s/1")
    for version in range(2):
        for name in ("submissions.json", "SHA256SUMS"):
            (tmp_path / "old" / "adapters" / f"v{version}" / name).unlink()
    out = tmp_path / "new"
    first = server(out, adapters=tmp_path / "old" / "adapters")
    identity = first.id
    first.close()
    again = server(out, adapters=tmp_path / "old" / "adapters")
    assert again.id == identity
    for member in (device("a"), device("b"), edge()):
        again.join(member)
    for name in "ab":
        submit(again, name, adapter(1), "s/1", version=1)  # nothing is known of what was in those versions
    assert again.version == 2
    assert ledger.check(out, tmp_path / "old" / "adapters") == ledger.Balance(accepted=2, counted=2)
    again.close()
    assert server(out, adapters=tmp_path / "old" / "adapters").id == identity


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda out: _without(out, "accepted"), "submission s/1 of device 'a' is in the ledger 0 times, and in"),
        (lambda out: _twice(out, "accepted"), "submission s/1 of device 'a' is in the ledger 2 times"),
        (lambda out: shutil.rmtree(out / "pool"), "submission s/2 of device 'a' was accepted and is nowhere"),
        (lambda out: shutil.copytree(out / "adapters" / "v1", out / "adapters" / "v2"), "is in versions and pool 2 times"),
        (lambda out: _without(out, "version", 1), "version 0 holds [], and the ledger says None"),
        (lambda out: shutil.rmtree(out / "adapters" / "v1"), "version 1 holds None, and the ledger says [('a', 's/1')"),
    ],
)
def test_what_does_not_add_up_is_found(tmp_path: Path, harm: Callable[[Path], object], problem: str) -> None:
    fed = begun(tmp_path)
    for name in "ab":
        submit(fed, name, adapter(1), "s/1")
    submit(fed, "a", adapter(1), "s/2", 1)
    fed.close()
    assert ledger.check(tmp_path) == ledger.Balance(accepted=3, counted=2, pooled=1)
    harm(tmp_path)
    assert any(problem in each for each in ledger.check(tmp_path).problems), ledger.check(tmp_path).problems


def _without(out: Path, event: str, count: int = 1) -> None:
    """Take the first lines of this event out."""
    kept = (out / ledger.FILE).read_text().splitlines(keepends=True)
    for line in [line for line in kept if f'"{event}"' in line.split(",")[0]][:count]:
        kept.remove(line)
    (out / ledger.FILE).write_text("".join(kept))


def _twice(out: Path, event: str) -> None:
    kept = (out / ledger.FILE).read_text().splitlines(keepends=True)
    (out / ledger.FILE).write_text("".join([*kept, next(line for line in kept if f'"{event}"' in line)]))
