"""The device's checkpoints: two files, whose numbers only grow, of one device's one run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.device import checkpoints as module
from sfl.device.checkpoints import CheckpointFiles, State, kept_cut
from sfl.device.daemon import kept_in
from sfl.errors import StateDiffersError, StateError, StateInUseError, StateWriteError
from sfl.state_file import write_state

IDENTITY: dict[str, Any] = {"cut": 2, "labels": ("a", "b"), "optimizer.learning_rate": 0.1}


def opened(folder: Path, **changes: Any) -> CheckpointFiles:
    made = CheckpointFiles(folder)
    made.require({**IDENTITY, **changes})
    return made


def write(files: CheckpointFiles, step: int, session: str = "s", must: bool = True) -> int:
    def state() -> State:
        return {"session": session, "step": step}, {"x": np.full(3, step)}

    return files.write(state, must)


def step_of(state: State) -> int:
    document, tensors = state
    assert (tensors["x"] == document["step"]).all()
    return int(document["step"])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.state"))


def test_the_last_two_are_kept_and_found_again(tmp_path: Path) -> None:
    files = opened(tmp_path)
    assert files.session is None and files.held == ()
    assert [write(files, 10 * number) for number in (1, 2, 3)] == [1, 2, 3]
    assert names(tmp_path) == ["checkpoint-2.state", "checkpoint-3.state"]
    files.close()
    files = opened(tmp_path)
    assert (files.session, files.held) == ("s", (2, 3))
    assert files.document["step"] == 30
    assert [step_of(files.read(number)) for number in (2, 3)] == [20, 30]
    assert write(files, 40) == 4
    files.clear()
    assert names(tmp_path) == [] and files.held == ()


def test_that_a_run_was_done_is_known_until_another_one_has_begun(tmp_path: Path) -> None:
    def done() -> bool:
        files = opened(tmp_path)
        files.close()
        return files.done

    assert not done()
    files = opened(tmp_path)
    write(files, 1)
    files.close()
    assert not done(), "it goes on"
    files = opened(tmp_path)
    files.clear()
    files.close()
    assert done() and done()
    files = opened(tmp_path)
    write(files, 1)
    files.close()
    assert not files.done and not done()
    (tmp_path / "checkpoint-1.state").unlink()
    assert not done(), "nobody knows what became of that one"


def test_what_came_after_the_edges_checkpoint_never_was(tmp_path: Path) -> None:
    files = opened(tmp_path)
    for number in (1, 2):
        write(files, number)
    files.go_back(1)
    assert files.held == (1,) and names(tmp_path) == ["checkpoint-1.state"]
    assert write(files, 7) == 2
    assert step_of(files.read(2)) == 7


def test_another_session_does_not_hold_the_checkpoints_of_the_last(tmp_path: Path) -> None:
    files = opened(tmp_path)
    write(files, 1, "first")
    write(files, 2, "second")
    assert files.held == (2,) and files.session == "second"
    files.close()
    assert opened(tmp_path).held == (2,)


def test_an_amended_one_keeps_its_number(tmp_path: Path) -> None:
    files = opened(tmp_path)
    write(files, 1)
    files.amend(lambda: ({"session": "s", "step": 1, "tested": True}, {"x": np.ones(3)}))
    assert files.held == (1,) and files.newest()[0]["tested"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cut": 3}, "trained with cut 2, and now it is 3: put that back, choose another `out`, or delete that folder"),
        ({"labels": ["a", "c"]}, "trained with labels a, b, and now it is a, c"),
        ({"optimizer.learning_rate": 0.2}, "optimizer.learning_rate 0.1, and now it is 0.2"),
        ({"new": 1}, "trained with new None, and now it is 1"),
    ],
)
def test_other_settings_are_refused_with_both_values(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    files = opened(tmp_path)
    write(files, 1)
    files.close()
    with pytest.raises(StateDiffersError, match=message):
        opened(tmp_path, **changes)


def test_settings_may_change_before_anything_is_kept(tmp_path: Path) -> None:
    opened(tmp_path).close()
    assert write(opened(tmp_path, cut=3), 1) == 1
    assert kept_cut(tmp_path) == 3


def test_what_has_not_done_a_step_binds_nobody(tmp_path: Path) -> None:
    files = opened(tmp_path)
    write(files, 0)
    files.amend(lambda: ({"session": "s", "run": {"steps": 0}}, {}))
    files.close()
    files = CheckpointFiles(tmp_path)
    assert kept_in(files) == {} and files.session is None
    files.require({**IDENTITY, "cut": 3})
    write(files, 1)
    files.amend(lambda: ({"session": "s", "run": {"steps": 1}}, {}))
    files.close()
    assert kept_in(CheckpointFiles(tmp_path))["run"] == {"steps": 1}


def test_a_cut_is_known_before_the_folder_is_opened(tmp_path: Path) -> None:
    assert kept_cut(tmp_path / "nowhere") is None
    files = opened(tmp_path)
    assert kept_cut(tmp_path) is None
    write(files, 1)
    assert kept_cut(tmp_path) == 2


def test_a_damaged_one_is_passed_over_and_two_are_an_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = opened(tmp_path)
    for number in (1, 2):
        write(files, number)
    files.close()
    (tmp_path / "checkpoint-2.state").write_bytes(b"half")
    files = opened(tmp_path)
    assert files.held == (1,) and "checkpoint-2.state is damaged" in caplog.text
    files.close()
    (tmp_path / "checkpoint-1.state").write_bytes(b"half")
    with pytest.raises(StateError, match="is damaged"):
        CheckpointFiles(tmp_path)
    for path in tmp_path.glob("*.state"):
        path.unlink()
    assert opened(tmp_path).held == ()  # as the message says


def test_one_of_another_version_is_refused(tmp_path: Path) -> None:
    tmp_path.mkdir(exist_ok=True)
    write_state(tmp_path / "checkpoint-1.state", {"format": 99, "session": "s"}, {})
    with pytest.raises(StateDiffersError, match="of another version of sfl"):
        CheckpointFiles(tmp_path)


def test_what_a_dead_process_was_writing_is_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-4.state.tmp").write_bytes(b"half")
    opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_one_device_at_a_time(tmp_path: Path) -> None:
    files = opened(tmp_path)
    with pytest.raises(StateInUseError, match="another device works with"):
        opened(tmp_path)
    files.close()
    opened(tmp_path)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    files = opened(tmp_path)
    write(files, 1)
    real, failures, slept = module.write_state, [3], list[float]()

    def full(*arguments: Any) -> int:
        failures[0] -= 1
        if failures[0] >= 0:
            raise StateWriteError("the disk is full")
        return real(*arguments)

    monkeypatch.setattr(module, "write_state", full)
    monkeypatch.setattr(module.time, "sleep", slept.append)
    with caplog.at_level("WARNING", "sfl"):
        assert write(files, 2, must=False) == 0  # one that need not be
    assert "training goes on without this checkpoint" in caplog.text and not slept
    with pytest.raises(StateWriteError, match="the disk is full"):
        write(files, 2)  # one that must, and no time to wait
    files.close()
    files = CheckpointFiles(tmp_path, give_up_s=60)
    files.require(IDENTITY)
    failures[0] = 2
    assert write(files, 3) == 2  # after two tries more
    assert len(slept) == 2 and step_of(files.newest()) == 3


def test_killed_while_all_are_deleted_the_newest_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    files = opened(tmp_path)
    for step in range(10):
        write(files, step)
    files.close()
    files = opened(tmp_path)
    assert files.held == (9, 10)
    unlink = Path.unlink

    def once(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        raise Killed

    monkeypatch.setattr(Path, "unlink", once)
    with pytest.raises(Killed):
        files.clear()
    assert names(tmp_path) == ["checkpoint-10.state"]


def test_who_begins_anew_leaves_what_there_was_until_its_own_first(tmp_path: Path) -> None:
    files = opened(tmp_path)
    write(files, 0, "old")
    files.close()
    files = CheckpointFiles(tmp_path)
    assert files.document
    files.begin_anew()
    files.require({**IDENTITY, "cut": 3})  # what the old one was trained with is of no account
    assert (files.session, files.held, files.document) == (None, (), {})
    files.close()  # killed before its first
    files = CheckpointFiles(tmp_path)
    assert files.document and files.session == "old"
    files.begin_anew()
    files.require(IDENTITY)
    assert write(files, 0, "new") == 2
    assert names(tmp_path) == ["checkpoint-2.state"] and (files.session, files.held) == ("new", (2,))
    files.clear()
    assert not names(tmp_path)
