from __future__ import annotations

import errno
import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from sfl.adapters.peft_format import AdapterWriteError
from sfl.adapters.state import HEAD, AdapterKey, AdapterState, device_half, edge_half, total
from sfl.errors import AdapterError, BusyError
from sfl.fed_server import half_files
from sfl.fed_server import pool as pool_module
from sfl.fed_server.half_files import HalfFile
from sfl.fed_server.pool import Pool
from sfl.telemetry import peak_since_restart_mb, restart_peak
from tests.fed_server.made import Clock, adapter, half, no_file_above, no_more_files, same


def made(folder: Path | None = None) -> Pool:
    return Pool(folder, 600, Clock())


def add(pool: Pool, name: str, state: AdapterState, submission: str = "1", version: int = 0, rank: int = 2, cut: int = 1) -> None:
    """Both halves of a submission."""
    pool.add(half("edge", name, submission, version), edge_half(state, cut), rank, cut)
    pool.add(half("device", name, submission, version, examples=8, steps=1), device_half(state, cut), rank, cut)


def test_what_is_pooled_comes_back_to_the_bit_and_goes_when_it_is_removed(tmp_path: Path) -> None:
    pool = made(tmp_path / "pool")
    for seed, name in enumerate("cab"):
        add(pool, name, adapter(seed))
    pool.add(half("device", "a", "2", steps=3), device_half(adapter(9), 1), 2, 1)
    assert len(list((tmp_path / "pool").iterdir())) == 7
    taken = pool.take(mix_versions=True)
    assert [one.first.device for one in taken] == ["a", "b", "c"]
    assert all(same(one.read(), adapter(seed)) for one, seed in zip(taken, (1, 2, 0)))
    key = AdapterKey(HEAD, "score", "weight")
    assert taken[0].read([key]).keys() == {key}
    pool.remove(taken)
    assert pool.counts() == {} and [path.name for path in (tmp_path / "pool").iterdir()] == ["00000007-device.safetensors"]
    pool.drop("a")
    assert not list((tmp_path / "pool").iterdir())


def test_a_file_says_whose_half_it_is(tmp_path: Path) -> None:
    pool = made(tmp_path)
    odd = half("device", "../a b", "s/1", version=3, examples=80, steps=10, failures=2)
    pool.add(odd, device_half(adapter(1), 1), rank=2, cut=1)
    (path,) = tmp_path.iterdir()
    with safe_open(path, "numpy") as file:
        about = file.metadata()
    assert len(about.pop("sha256")) == 64
    assert about == {"device": "../a b", "submission": "s/1", "half": "device", "version": "3", "examples": "80"} | {
        "steps": "10",
        "failures": "2",
        "bytes_per_s": "None",
        "round_trip_s": "None",
        "rank": "2",
        "cut": "1",
    }


def test_what_was_read_outlives_its_file_and_cannot_be_changed(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    file = half_files.write(path, adapter(1), {})
    read = file.read()
    assert not any(value.flags.writeable for value in read.values())
    path.unlink()
    gc.collect()
    assert same(read, adapter(1))


def test_successive_submissions_of_a_device_add_up() -> None:
    pool = made()
    add(pool, "a", adapter(1), "1")
    add(pool, "b", adapter(3), "1")
    add(pool, "a", adapter(2), "2")
    a, b = pool.take(mix_versions=True)
    assert same(a.read(), total(adapter(1), adapter(2))) and same(b.read(), adapter(3))
    assert (len(a.submissions), a.ever, b.ever, pool.counts()) == (2, 2, 1, {"a": 2, "b": 1})
    pool.remove([a, b])
    add(pool, "a", adapter(4), "3")
    (again,) = pool.take(mix_versions=True)
    assert (again.ever, pool.submissions()) == (3, 4)


def test_what_cannot_be_added_up_is_left_for_the_next_time() -> None:
    pool = made()
    for submission, version in (("1", 0), ("2", 0), ("3", 1)):
        add(pool, "a", adapter(int(submission)), submission, version)
    assert len(pool.take(mix_versions=True)[0].submissions) == 3
    (first,) = pool.take(mix_versions=False)
    assert same(first.read(), total(adapter(1), adapter(2))) and first.ever == 2
    pool.remove([first])
    assert pool.counts() == {"a": 1}
    (rest,) = pool.take(mix_versions=False)
    assert same(rest.read(), adapter(3)) and rest.ever == 3
    small = {key: value[:1] if key.part == "A" else value[:, :1] for key, value in adapter(4).items() if key.layer != HEAD}
    add(pool, "a", {**adapter(4), **small}, "4", 1, rank=1)
    (rest,) = pool.take(mix_versions=True)
    assert rest.first.rank == 2 and len(rest.submissions) == 1, "another rank"


def test_a_full_disk_refuses_a_half_of_which_nothing_stays(tmp_path: Path) -> None:
    pool = made(tmp_path)
    new = half("device", "a")
    with no_file_above(200), pytest.raises(AdapterWriteError, match="cannot keep half an update"):
        pool.add(new, adapter(1), 2, 4)
    assert not list(tmp_path.iterdir()) and not pool.knows(new) and not pool.waits_for(new)
    add(pool, "a", adapter(1))
    assert same(pool.take(mix_versions=True)[0].read(), adapter(1))


def test_what_an_earlier_server_left_is_taken_up_in_the_same_order(tmp_path: Path) -> None:
    first = made(tmp_path)
    for seed, (name, submission) in enumerate([("b", "s/2"), ("a", "s/1"), ("b", "s/1")]):
        add(first, name, adapter(seed), submission)
    odd = half("device", "../a b", "s/1", version=3, examples=80, steps=10, failures=2, bytes_per_s=1.5)
    first.add(odd, device_half(adapter(9), 2), rank=1, cut=2)
    (tmp_path / ".00000009-edge.safetensors").write_bytes(b"unfinished")
    (tmp_path / "notes").write_text("mine")
    again = made(tmp_path)
    assert not (tmp_path / ".00000009-edge.safetensors").exists() and (tmp_path / "notes").exists()
    assert [one.submission for one in again.whole()] == [one.submission for one in first.whole()] == ["s/1", "s/2", "s/1"]
    assert again.counts() == {"b": 2, "a": 1} and again.halves() == {("../a b", "s/1")} and again.submissions() == 3
    assert all(same(mine.read(), theirs.read()) for mine, theirs in zip(again.take(True), first.take(True), strict=True))
    assert again.knows(odd) and again.knows(half("edge", "b", "s/2")) and not again.knows(half("edge", "../a b", "s/1"))
    again.add(half("edge", "../a b", "s/1", version=3), edge_half(adapter(9), 2), rank=1, cut=2)
    (whole,) = (one for one in again.whole() if one.device == "../a b")
    assert (whole.version, whole.trained_on, whole.steps, whole.rank, whole.cut) == (3, 80, 10, 1, 2)
    assert same(whole.read(), adapter(9)) and (tmp_path / "00000008-edge.safetensors").exists()


def test_what_is_in_a_version_is_not_taken_up_again(tmp_path: Path) -> None:
    add(made(tmp_path), "a", adapter(1), "s/1")
    again = Pool(tmp_path, 600, Clock(), settled=[("a", "s/1")])
    assert again.counts() == {} and not list(tmp_path.iterdir()) and again.knows(half("device", "a", "s/1"))
    add(again, "a", adapter(2), "s/2")
    assert again.take(True)[0].ever == 2


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, None])
def test_a_damaged_half_is_set_aside_and_told(tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    add(made(tmp_path), "a", adapter(1))
    path = tmp_path / "00000002-device.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]) if content is None else content)
    again = made(tmp_path)
    assert again.counts() == {} and again.halves() == {("a", "1")} and not again.knows(half("device", "a"))
    assert "00000002-device.safetensors.damaged, and not counted" in caplog.text
    assert {each.name for each in tmp_path.iterdir()} == {"00000001-edge.safetensors", f"{path.name}.damaged"}


def test_a_half_that_the_disk_does_not_give_is_set_aside_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The way to it, its header and its mapping are good; in memory that is mapped the bad sector would end the process."""
    add(made(tmp_path), "a", adapter(1))
    opened, path = Path.open, tmp_path / "00000002-device.safetensors"

    class Failing:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *arguments: Any) -> None:
            self.file.close()

        def fileno(self) -> int:
            return int(self.file.fileno())

        def read(self, size: int) -> bytes:
            if self.file.tell() + size > path.stat().st_size:
                raise OSError(errno.EIO, "Input/output error")
            return bytes(self.file.read(size))

    monkeypatch.setattr(
        Path, "open", lambda self, *a, **k: Failing(opened(self, *a, **k)) if self == path else opened(self, *a, **k)
    )
    assert made(tmp_path).halves() == {("a", "1")} and "Input/output error" in caplog.text
    assert {each.name for each in tmp_path.iterdir()} == {"00000001-edge.safetensors", f"{path.name}.damaged"}


def test_a_half_that_cannot_be_read_at_the_start_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(made(tmp_path), "a", adapter(1))
    read = HalfFile.read

    def starved(self: HalfFile) -> Any:
        with no_more_files():
            return read(self)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Too many open files"):
        patch.setattr(HalfFile, "read", starved)
        made(tmp_path)
    assert made(tmp_path).counts() == {"a": 1}


def test_a_device_fills_no_disk_with_halves_or_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "_MOST_WAITING", 2)
    monkeypatch.setattr(pool_module, "_MOST_WHOLE", 3)
    pool = made(tmp_path)

    def device_halves(*submissions: str) -> None:
        for submission in submissions:
            pool.add(half("device", "a", submission), device_half(adapter(1), 1), 2, 1)

    def edge_halves(*submissions: str) -> None:
        for submission in submissions:
            pool.add(half("edge", "a", submission), edge_half(adapter(1), 1), 2, 1)

    add(pool, "b", adapter(1))
    device_halves("0", "1", "2")
    assert [each.submission for each in pool.crowded_out(half("device", "a", "2"))] == ["0"]
    assert not pool.crowded_out(half("device", "a", "2")) and pool.halves() == {("a", "1"), ("a", "2")}
    edge_halves("3", "4")  # whoever sends for the device has as many of its own
    assert not pool.crowded_out(half("edge", "a", "4")) and len(list(tmp_path.iterdir())) == 6
    edge_halves("1")
    device_halves("3")
    edge_halves("2")
    with pytest.raises(BusyError, match=r"3 submissions of device 'a' wait for the next version"):
        device_halves("5")
    device_halves("4")  # what completes a submission is always taken
    pool.remove(pool.take(mix_versions=True))
    device_halves("5")


def test_an_update_that_cannot_be_accepted_is_as_if_its_last_half_had_not_come(tmp_path: Path) -> None:
    def refuse(submission: object) -> None:
        raise AdapterWriteError("no room for the ledger")

    pool = Pool(tmp_path, 600, Clock(), accept=refuse)
    pool.add(half("edge", "a"), edge_half(adapter(1), 1), 2, 1)
    with pytest.raises(AdapterWriteError, match="no room"):
        pool.add(half("device", "a"), device_half(adapter(1), 1), 2, 1)
    assert not pool.knows(half("device", "a")) and pool.counts() == {} and pool.halves() == {("a", "1")}
    assert [path.name for path in tmp_path.iterdir()] == ["00000001-edge.safetensors"]


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterWriteError, match="cannot be kept in"):
        made(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"short", b"\xff" * 100, b"\x02\0\0\0\0\0\0\0[]", None])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes | None) -> None:
    pool = made(tmp_path)
    add(pool, "a", adapter(1))
    path = tmp_path / "00000002-device.safetensors"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(AdapterError, match=r"00000002-device.* cannot be read"):
        pool.take(mix_versions=True)[0].read()


def test_reading_takes_the_memory_of_one_update_however_many_there_are() -> None:
    pool = made()
    big = {AdapterKey(0, "q", "A"): np.ones((2, 500_000), "f4"), AdapterKey(1, "q", "A"): np.ones((2, 500_000), "f4")}
    for number in range(30):
        add(pool, f"d{number:02}", big)
    sums = {key: np.zeros_like(value) for key, value in big.items()}
    if not restart_peak():
        pytest.skip("the kernel does not count the peak anew")
    before = peak_since_restart_mb()
    for pooled in pool.take(mix_versions=True):
        for key, value in pooled.read().items():
            sums[key] += value
    assert all((value == 30).all() for value in sums.values())
    assert peak_since_restart_mb() - before < 40, "30 updates of 8 MB"
