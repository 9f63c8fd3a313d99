"""Who has which examples."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfl.compare.division import Source
from sfl.compare.settings import CompareSettings
from sfl.errors import DataError, SettingsError
from tests.flows import write_texts


def source(path: Path, **changes: object) -> Source:
    return Source(CompareSettings.model_validate({"data": path, **changes}))


def test_a_folder_is_one_device_a_file(tmp_path: Path) -> None:
    for name in ("b.conn.log.labeled", "a.tsv.txt", ".hidden.txt", "notes.pdf"):
        write_texts(tmp_path / name, 60)
    first, second = source(tmp_path).division(0), source(tmp_path).division(5)
    assert list(first.splits) == list(second.splits) == ["a", "b"]
    assert first.splits == second.splits
    assert first.labels == ("Benign", "C&C", "DDoS")
    assert len(first.pooled.train) == sum(len(splits.train) for splits in first.splits.values())
    assert first.pooled.test == [] and sum(map(len, first.tests.values())) > 0


def test_files_of_one_short_name_keep_their_whole_names(tmp_path: Path) -> None:
    for name in ("x.1.txt", "x.2.txt"):
        write_texts(tmp_path / name, 60)
    assert list(source(tmp_path).division(0).splits) == ["x.1.txt", "x.2.txt"]


def test_one_file_is_divided_anew_for_each_seed(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts.txt", 300)
    even, skewed = source(path, devices=3), source(path, devices=3, alpha=0.3)
    sizes = [len(splits.train) + len(splits.validation) + len(splits.test) for splits in even.division(0).splits.values()]
    assert list(even.division(0).splits) == ["device-1", "device-2", "device-3"] and sum(sizes) == 300 and max(sizes) <= 101
    assert skewed.division(0).splits != skewed.division(1).splits
    assert skewed.division(0).splits != even.division(0).splits
    test = {example.key for examples in skewed.division(0).tests.values() for example in examples}
    assert test == {example.key for examples in skewed.division(1).tests.values() for example in examples}


def test_the_fingerprint_is_that_of_the_contents(tmp_path: Path) -> None:
    path = write_texts(tmp_path / "one" / "texts.txt", 40)
    before = source(path, devices=2).fingerprint
    assert source(write_texts(tmp_path / "two" / "texts.txt", 40), devices=2).fingerprint == before
    assert source(write_texts(tmp_path / "three" / "texts.txt", 41), devices=2).fingerprint != before


def test_what_cannot_be_divided_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no data file or folder"):
        source(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no data: it needs a file for each device"):
        source(tmp_path)
    path = write_texts(tmp_path / "texts.txt", 60, labels=("Benign",))
    with pytest.raises(SettingsError, match="say with `devices`"):
        source(path)
    with pytest.raises(SettingsError, match="is a folder, one device a file"):
        source(tmp_path, devices=2)
    with pytest.raises(DataError, match="only one label, 'Benign'"):
        source(path, devices=2).division(0)
