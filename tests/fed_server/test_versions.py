from __future__ import annotations

from pathlib import Path

import pytest

from sfl.adapters.layout import AdapterLayout
from sfl.errors import AdapterError
from sfl.fed_server.versions import VersionStore
from tests.fed_server.made import LAYERS, LORA, adapter, same

LAYOUT = AdapterLayout("base", "abc", "classification", LORA, "model.layers", ("score",), LAYERS, ("a", "b"))


def test_versions_come_back_from_memory_from_disk_and_after_a_restart(tmp_path: Path) -> None:
    store = VersionStore(tmp_path / "adapters")
    assert store.newest() is None
    for number in range(11):
        store.publish(number, adapter(number), LAYOUT)
    assert same(store.load(10), adapter(10))
    assert same(store.load(3), adapter(3))
    again = VersionStore(tmp_path / "adapters").newest()
    assert again is not None and again.number == 10 and again.layout == LAYOUT and same(again.state, adapter(10))


def test_a_version_that_is_not_there_is_named(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    with pytest.raises(AdapterError, match=r"none is published"):
        store.load(0)
    store.publish(0, adapter(0), LAYOUT)
    with pytest.raises(AdapterError, match=r"no version 1: the newest is 0"):
        store.load(1)
    with pytest.raises(AdapterError, match=r"the next one is 1"):
        store.publish(2, adapter(0), LAYOUT)


def test_a_failed_write_leaves_the_newest_as_it_was(tmp_path: Path) -> None:
    store = VersionStore(tmp_path)
    store.publish(0, adapter(0), LAYOUT)
    (tmp_path / "v1").mkdir()
    with pytest.raises(AdapterError, match=r"exists already"):
        store.publish(1, adapter(1), LAYOUT)
    newest = store.newest()
    assert newest is not None and newest.number == 0


def test_what_a_killed_server_left_unfinished_is_swept_away_and_nothing_else(tmp_path: Path) -> None:
    VersionStore(tmp_path).publish(0, adapter(0), LAYOUT)
    for name in (".v1.0123456789abcdef0123456789abcdef", ".hidden", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    VersionStore(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"v0", ".hidden", "notes"}


def test_a_damaged_newest_version_stops_the_start(tmp_path: Path) -> None:
    VersionStore(tmp_path).publish(0, adapter(0), LAYOUT)
    path = tmp_path / "v0" / "adapter_model.safetensors"
    whole = path.read_bytes()
    for content in (b"no", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(content)
        with pytest.raises(AdapterError, match=r"adapter_model.safetensors is damaged, or was changed.*SHA256SUMS"):
            VersionStore(tmp_path)
    (tmp_path / "v0" / "SHA256SUMS").unlink()
    assert VersionStore(tmp_path).newest() is not None, "a last bit that is another makes an adapter, too"
