"""Files and the checksums of their blocks."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest

from sfl.cache.key import HalfKey, checked_key
from sfl.cache.manifest import BLOCK_BYTES, Gap, Manifest, StoredFile, check
from sfl.errors import ModelError, WireError
from sfl.wire.provision import manifest_from_wire, manifest_to_wire
from tests.provision.made import SOURCE, damage, write_half


@pytest.fixture
def half(tmp_path: Path) -> Path:
    folder = tmp_path / "half"
    folder.mkdir()
    write_half(folder)
    return folder


def weights(manifest: Manifest) -> StoredFile:
    return next(file for file in manifest.files if file.name == "model.safetensors")


def test_a_manifest_knows_every_byte(half: Path) -> None:
    manifest = Manifest.of(half)
    assert [file.name for file in manifest.files] == ["model.safetensors", "sfl.json", "vocab.txt"]
    assert manifest.size == sum(path.stat().st_size for path in half.iterdir())
    assert len(weights(manifest).blocks) == 6
    assert manifest.gaps(half) == []
    assert Manifest.from_json(manifest.to_json()) == manifest
    assert manifest_from_wire(manifest_to_wire(manifest)) == manifest


def test_gaps_are_whole_blocks_and_neighbours_are_one(half: Path) -> None:
    manifest = Manifest.of(half)
    file, path = weights(manifest), half / "model.safetensors"
    for position in (0, 3 * BLOCK_BYTES - 1, 3 * BLOCK_BYTES):
        damage(path, position)
    assert manifest.gaps(half) == [Gap(file, 0, BLOCK_BYTES), Gap(file, 2 * BLOCK_BYTES, 2 * BLOCK_BYTES)]
    os.truncate(path, 4 * BLOCK_BYTES + 7)
    assert manifest.gaps(half)[-1] == Gap(file, 2 * BLOCK_BYTES, file.size - 2 * BLOCK_BYTES)


def test_missing_empty_and_longer_files_are_gaps(half: Path) -> None:
    manifest = Manifest.of(half)
    (half / "vocab.txt").unlink()
    (half / "sfl.json").unlink()
    with (half / "model.safetensors").open("ab") as stream:
        stream.write(b"more")
    found = {gap.file.name: gap for gap in manifest.gaps(half)}
    assert found["vocab.txt"].length == 0
    assert found["sfl.json"].length == found["sfl.json"].file.size
    assert "model.safetensors" in found


def test_a_link_is_no_file_of_a_half(half: Path, tmp_path: Path) -> None:
    manifest = Manifest.of(half)
    (half / "sfl.json").rename(tmp_path / "elsewhere")
    (half / "sfl.json").symlink_to(tmp_path / "elsewhere")
    assert [gap.file.name for gap in manifest.gaps(half)] == ["sfl.json"]


@pytest.mark.parametrize(
    "name",
    [
        "../x.json",
        "a/b.json",
        "/etc/passwd.txt",
        "..",
        "",
        ".json",
        "a\\b.json",
        "a\0.json",
        "x.py",
        "x.bin",
        "é.json",
        "a" * 200 + ".json",
    ],
)
def test_names_that_are_not_plain_are_refused(name: str) -> None:
    with pytest.raises(WireError, match=r"is no name of a model's file"):
        check(Manifest(BLOCK_BYTES, (StoredFile(name, 0, ()),)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 2**50, "blocks": ()}, "announced with"),
        ({"size": 2}, "do not fit together"),
        ({"blocks": ()}, "do not fit together"),
        ({"size": 1, "blocks": (b"short",)}, "do not fit together"),
    ],
)
def test_sizes_and_checksums_that_cannot_be_are_refused(change: dict[str, object], message: str) -> None:
    good = StoredFile("a.json", 2**20 + 1, (bytes(32), bytes(32)))
    check(Manifest(BLOCK_BYTES, (good,)))
    with pytest.raises(WireError, match=message):
        check(Manifest(BLOCK_BYTES, (dataclasses.replace(good, **change),)))  # type: ignore[arg-type]


def test_too_many_files_equal_names_and_absurd_blocks_are_refused() -> None:
    empty = StoredFile("a.json", 0, ())
    many = tuple(StoredFile(f"{number}.json", 0, ()) for number in range(65))
    for files in ((), many, (empty, StoredFile("A.json", 0, ()))):
        with pytest.raises(WireError, match="1 to 64 files of different names"):
            check(Manifest(BLOCK_BYTES, files))
    for block in (0, 1, 2**40):
        with pytest.raises(WireError, match="blocks of"):
            check(Manifest(block, (empty,)))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"block_bytes": 1048576, "files": [{"name": "a.json"}]}'])
def test_a_text_that_is_no_manifest(text: str) -> None:
    with pytest.raises(WireError):
        Manifest.from_json(text)


def test_a_packed_folder_with_code_in_it_is_not_provided(half: Path) -> None:
    (half / "modeling.py").write_text("")
    with pytest.raises(ModelError, match=r"cannot be provided: 'modeling.py'"):
        Manifest.of(half)


@pytest.mark.parametrize(
    ("source", "cut", "precision"),
    [("../..", 1, "int8"), ("A" * 64, 1, "int8"), ("a" * 63, 1, "int8"), (SOURCE, 0, "int8"), (SOURCE, 1, "../x")],
)
def test_what_names_no_half(source: str, cut: int, precision: str) -> None:
    assert checked_key(SOURCE, 1, "int8") == HalfKey(SOURCE, 1, "int8")
    with pytest.raises(WireError):
        checked_key(source, cut, precision)
