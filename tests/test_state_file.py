"""A state's file: what was written, or an error; never something else."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from sfl import disk
from sfl.disk import UNFINISHED
from sfl.errors import StateError, StateWriteError
from sfl.state_file import read_state, write_state
from tests.fed_server.made import no_file_above, no_more_files

DOCUMENT: dict[str, Any] = {
    "step": 3,
    "loss": 0.1 + 0.2,
    "best": float("inf"),
    "name": "Gerät-1",
    "nested": {"list": [1, None, "x"]},
}
TENSORS: dict[str, Any] = {
    "value/0/q/A": np.arange(6, dtype="f4").reshape(2, 3),
    "turned": np.arange(6, dtype="f8").reshape(2, 3).T,
    "random": np.arange(255, dtype="u1"),
    "step": np.array(7.0, dtype="f4"),
    "empty": np.zeros((0, 4), dtype="i8"),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "some.state"
    write_state(made, DOCUMENT, TENSORS)
    return made


def test_what_was_written_is_read(path: Path) -> None:
    document, tensors = read_state(path)
    assert document == DOCUMENT
    assert tensors.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape
        assert np.array_equal(tensors[name], value)
    assert [each.name for each in path.parent.iterdir()] == ["some.state"]


def test_its_size_is_told_and_the_later_one_takes_its_place(path: Path) -> None:
    assert write_state(path, {"step": 4}, {}) == path.stat().st_size
    assert read_state(path) == ({"step": 4}, {})


def test_no_byte_can_change_or_be_missing_unnoticed(path: Path) -> None:
    whole = path.read_bytes()
    chance = np.random.default_rng(0)
    places = {0, 7, 8, 9, len(whole) - 33, len(whole) - 32, len(whole) - 1, *chance.integers(0, len(whole), 40).tolist()}
    for place in sorted(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(chance.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(StateError, match=r"some.state is damaged, or was not written by sfl.*restore it.*or delete it"):
            read_state(path)
        path.write_bytes(whole[:place])
        with pytest.raises(StateError, match="is damaged"):
            read_state(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(StateError, match="is damaged"):
        read_state(path)


def test_what_cannot_be_read_for_a_moment_is_not_called_damaged(path: Path) -> None:
    with no_more_files(), pytest.raises(OSError, match="Too many open files"):
        read_state(path)
    assert read_state(path)[0] == DOCUMENT
    path.unlink()
    path.symlink_to(path)  # an error that comes each time
    with pytest.raises(StateError, match=r"some.state cannot be read: Too many levels"):
        read_state(path)


def test_files_of_another_kind(path: Path) -> None:
    path.write_text("no state at all")
    with pytest.raises(StateError, match="was not written by sfl"):
        read_state(path)
    save_file({"a": np.ones(2)}, path)
    with pytest.raises(StateError, match="was not written by sfl"):
        read_state(path)
    body = path.read_bytes()
    path.write_bytes(body + hashlib.sha256(body).digest())  # all that is missing is the document
    with pytest.raises(StateError, match="not written by this version"):
        read_state(path)
    path.write_bytes(b"short" + hashlib.sha256(b"short").digest())
    with pytest.raises(StateError, match="not written by this version"):
        read_state(path)
    path.unlink()
    with pytest.raises(StateError, match="cannot be read: No such file"):
        read_state(path)


def test_on_a_full_disk_the_earlier_one_stays(path: Path) -> None:
    with no_file_above(4096), pytest.raises(StateWriteError, match=r"cannot write .*some.state: File too large.*untouched"):
        write_state(path, {"step": 5}, {"big": np.ones(5000)})
    assert read_state(path)[0] == DOCUMENT
    assert [each.name for each in path.parent.iterdir()] == ["some.state"]


def test_a_death_while_it_is_written_leaves_the_earlier_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class DiedError(BaseException):
        pass

    def die(*arguments: object) -> None:
        raise DiedError

    monkeypatch.setattr(disk, "sync", die)
    with pytest.raises(DiedError):
        write_state(path, {"step": 6}, TENSORS)
    monkeypatch.undo()
    assert read_state(path)[0] == DOCUMENT
    left = path.with_name(f".{path.name}{UNFINISHED}")
    assert left.exists()  # and is no state: whoever looks for states passes it over, and the next one is written over it
    write_state(path, {"step": 7}, {})
    assert not left.exists()


def test_the_disk_has_it_before_it_has_its_name(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = disk.sync

    def sync(what: Path) -> None:
        if what.is_file():
            assert read_state(path)[0] == DOCUMENT  # the earlier one still has the name
        synced.append(what.name)
        real(what)

    monkeypatch.setattr(disk, "sync", sync)
    write_state(path, {"step": 8}, {})
    assert synced == [f".{path.name}{UNFINISHED}", path.parent.name]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StateWriteError, match="cannot write"):
        write_state(tmp_path / "nowhere" / "a.state", {}, {})
