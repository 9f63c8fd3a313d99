"""The cache on disk: bounded, shared, never half a half."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sfl.cache.cache import HalfCache, default_folder
from sfl.cache.edges import KnownEdges, Provided
from sfl.cache.key import HalfKey
from sfl.cache.lock import try_lock, wait_for_lock
from sfl.cache.manifest import Manifest
from sfl.errors import ModelError, SettingsError, UnreachableError
from sfl.model.packed import FORMAT
from tests.provision.made import FINGERPRINT, KEY, OTHER, OTHER_SOURCE, SOURCE, write_half


def put(cache: HalfCache, key: HalfKey, used: float, size: int = 1_000_000) -> None:
    folder = cache.begin(key)
    write_half(folder, key, size)
    manifest = Manifest.of(folder)
    cache.make_room(key, manifest.size)
    cache.finish(key, manifest)
    os.utime(cache.model(key).parent, (used, used))


def cuts(cache: HalfCache) -> list[int]:
    return [entry.key.cut for entry in cache.entries()]


def key(cut: int) -> HalfKey:
    return HalfKey(SOURCE, cut, "int8")


def test_a_half_is_there_once_it_is_finished(tmp_path: Path) -> None:
    cache = HalfCache(tmp_path, 10)
    assert cache.manifest(KEY) is None and cache.entries() == []
    folder = cache.begin(KEY)
    write_half(folder)
    assert cache.manifest(KEY) is None
    assert [(entry.key, entry.complete) for entry in cache.entries()] == [(KEY, False)]
    manifest = Manifest.of(folder)
    assert cache.finish(KEY, manifest) == cache.model(KEY)
    assert cache.manifest(KEY) == manifest and manifest.gaps(cache.model(KEY)) == []
    assert [(entry.key, entry.complete) for entry in cache.entries()] == [(KEY, True)]
    assert (cache.begin(KEY) / "model.safetensors").is_file()  # what is there is kept
    assert cache.manifest(KEY) is None


def test_a_manifest_that_is_cut_off_counts_as_none(tmp_path: Path) -> None:
    cache = HalfCache(tmp_path, 10)
    put(cache, KEY, 1)
    file = cache.model(KEY).parent / "manifest.json"
    file.write_bytes(file.read_bytes()[:50])
    assert cache.manifest(KEY) is None


@pytest.mark.parametrize(
    ("note", "message"),
    [
        (None, "it has no sfl.json"),
        ("{", "does not describe a packed half"),
        ("[]", "does not describe a packed half"),
        ("[" * 100_000, "does not describe a packed half"),
        (
            {"format": FORMAT + 1},
            f"of pack format {FORMAT + 1}, and this version of sfl reads format {FORMAT}: run the same version",
        ),
        ({"cut": 3}, "holds cut 3 in int8 of source cccccccccccc, not cut 2 in int8"),
        ({"source": OTHER_SOURCE}, "holds cut 2 in int8 of source dddddddddddd, not "),
    ],
)
def test_a_folder_that_is_another_half_is_never_finished(tmp_path: Path, note: str | dict | None, message: str) -> None:
    cache = HalfCache(tmp_path, 10)
    folder = cache.begin(KEY)
    write_half(folder)
    file = folder / "sfl.json"
    text = json.dumps({**json.loads(file.read_text()), **note}) if isinstance(note, dict) else note
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(ModelError, match=message):
        cache.finish(KEY, Manifest.of(folder))
    assert cache.manifest(KEY) is None


def test_the_least_recently_used_goes_first_and_what_is_in_use_never(tmp_path: Path) -> None:
    cache = HalfCache(tmp_path, 3.5)
    for cut, used in ((1, 100), (2, 300), (3, 200)):
        put(cache, key(cut), used)
    assert cuts(cache) == [1, 3, 2]
    lock = cache.try_lock(key(1), shared=True)
    assert lock is not None
    put(cache, key(4), 400)
    assert cuts(cache) == [1, 2, 4]
    cache.touch(key(2))
    lock.release()
    put(cache, key(5), 500)
    assert cuts(cache) == [4, 5, 2]


def test_no_room_is_an_error_that_names_the_limit(tmp_path: Path) -> None:
    cache = HalfCache(tmp_path, 1.5)
    put(cache, key(1), 1)
    with pytest.raises(SettingsError, match=r"takes 2 MB, and the cache .* may have 2 MB: raise `cache_limit_mb`"):
        cache.make_room(key(2), 1_600_000)
    reader = cache.try_lock(key(1), shared=True)
    assert reader is not None
    with reader, pytest.raises(SettingsError, match="halves in use take 1 of the 2 MB"):
        cache.make_room(key(2), 1_000_000)
    assert cuts(cache) == [1]
    cache.make_room(key(2), 1_000_000)
    assert cuts(cache) == []


def test_a_half_that_somebody_else_has_removed_since_makes_room(tmp_path: Path) -> None:
    cache = HalfCache(tmp_path, 10)
    put(cache, key(1), 1)
    (entry,) = cache.entries()
    assert cache.remove(entry)
    assert cache.remove(entry)
    put(cache, key(2), 2)
    assert cuts(cache) == [2]


def test_a_full_disk_is_an_error_that_names_both_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = HalfCache(tmp_path / "new", 10)
    cache.require_disk("it", 1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 3_000_000))
    cache.require_disk("it", 3_000_000)
    with pytest.raises(SettingsError, match=r"it needs 4 MB more in .*, and 3 MB are free"):
        cache.require_disk("it", 4_000_000)


def test_other_things_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    for name in ("notes/cut-1-int8", f"{SOURCE}/cut-x-int8", f"{SOURCE}/cut-1-int9", f"{SOURCE}/cut-01-int8"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / SOURCE / "cut").touch()
    cache = HalfCache(tmp_path, 2)
    assert cache.entries() == []
    put(cache, KEY, 1)
    assert len(cache.entries()) == 1
    assert (tmp_path / "notes/cut-1-int8").is_dir()


def test_locks_are_for_one_or_for_those_who_share(tmp_path: Path) -> None:
    path = tmp_path / "locks" / "one"
    with wait_for_lock(path, 1, "it", shared=True):
        shared = try_lock(path, shared=True)
        assert shared is not None
        shared.release()
        assert try_lock(path) is None
        with pytest.raises(UnreachableError, match=r"waited 0\.2 s for it, which another process has taken"):
            wait_for_lock(path, 0.2, "it")
    own = try_lock(path)
    assert own is not None and try_lock(path, shared=True) is None
    own.release()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "one"
    script = "import sys, pathlib, sfl.cache.lock as m; lock = m.try_lock(pathlib.Path(sys.argv[1])); print(lock); input()"
    command = [sys.executable, "-c", script, str(path)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None and child.stdout.readline()
    assert try_lock(path) is None
    child.kill()
    child.communicate()
    assert try_lock(path) is not None


def test_known_edges_are_remembered_and_forgotten(tmp_path: Path) -> None:
    known = KnownEdges(tmp_path)
    assert known.all() == {}
    known.forget("one:1")
    known.remember("one:1", Provided("m", FINGERPRINT, SOURCE))
    known.remember("two:2", Provided("n", OTHER, OTHER_SOURCE))
    assert known.all() == {"one:1": ("m", FINGERPRINT, SOURCE), "two:2": ("n", OTHER, OTHER_SOURCE)}
    known.forget("one:1")
    assert KnownEdges(tmp_path).all() == {"two:2": ("n", OTHER, OTHER_SOURCE)}
    (tmp_path / "edges.json").write_text("{broken")
    assert known.all() == {}


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder("edge") == tmp_path / "sfl" / "edge"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_folder("device") == tmp_path / ".cache" / "sfl" / "device"
