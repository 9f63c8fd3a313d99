"""`sfl cache`: what is kept, as a table and as JSON, and how it is cleared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfl.cache.cache import HalfCache
from sfl.cache.edges import KnownEdges, Provided
from sfl.cache.key import HalfKey
from sfl.cache.lock import FileLock
from sfl.cache.manifest import Manifest
from sfl.cli.cache import app
from sfl.errors import SettingsError
from tests.provision.made import FINGERPRINT, OTHER, OTHER_SOURCE, SOURCE, write_half

KEYS = (HalfKey(SOURCE, 1, "int8"), HalfKey(SOURCE, 2, "fp32"), HalfKey(OTHER_SOURCE, 1, "nf4"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HalfCache:
    """The default one of devices, with two models, of which "one:1" and "two:2" have provided the second."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = HalfCache(tmp_path / "sfl" / "device", 0)
    for key in KEYS:
        folder = cache.begin(key)
        write_half(folder, key, 2_000_000)
        cache.finish(key, Manifest.of(folder))
    for address in ("one:1", "two:2"):
        KnownEdges(cache.folder).remember(address, Provided("models/other", OTHER, OTHER_SOURCE))
    return cache


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.output


def used(cache: HalfCache, key: HalfKey) -> FileLock:
    lock = cache.try_lock(key, shared=True)
    assert lock is not None
    return lock


def kept(cache: HalfCache) -> set[HalfKey]:
    return {entry.key for entry in cache.entries()}


def test_the_list_says_what_is_kept(cache: HalfCache) -> None:
    cache.begin(KEYS[0])
    with used(cache, KEYS[2]):
        rows = {(row["source"], row["cut"]): row for row in json.loads(run("list", "--json"))}
        table = run("list")
    assert rows.keys() == {(key.source, key.cut) for key in KEYS}
    states = [rows[key.source, key.cut]["state"] for key in KEYS]
    assert states == ["broken off", "complete", "complete, in use"]
    row = rows[OTHER_SOURCE, 1]
    assert (row["precision"], row["model"], row["folder"]) == ("nf4", "models/other", str(cache.folder))
    assert 2_000_000 < row["bytes"] < 2_010_000
    assert "models/other" in table and SOURCE[:12] in table and "3 halves, 6.0 MB" in table


def test_a_model_is_cleared_by_the_beginning_of_its_source(cache: HalfCache) -> None:
    assert run("clear", SOURCE[:6]) == "cleared 2 halves, 4.0 MB\n"
    assert kept(cache) == {KEYS[2]}
    assert not (cache.folder / SOURCE).exists()


def test_everything_is_cleared_but_what_is_in_use(cache: HalfCache) -> None:
    with used(cache, KEYS[0]):
        assert "cut 1 in int8 of source cccccccccccc is in use and stays" in run("clear", "--all")
    assert kept(cache) == {KEYS[0]}
    assert KnownEdges(cache.folder).all() == {}


def test_the_edge_of_what_stays_is_not_forgotten(cache: HalfCache) -> None:
    KnownEdges(cache.folder).remember("three:3", Provided("models/first", FINGERPRINT, SOURCE))
    with used(cache, KEYS[2]):
        said = run("clear", "--all")
        assert f"{cache.folder}: {KEYS[2]} is in use and stays\n" in said and "cleared 2 halves" in said
    assert KnownEdges(cache.folder).all().keys() == {"one:1", "two:2"}
    run("clear", "--edge", "one:1")
    assert run("clear", "--edge", "two:2").startswith("cleared 1 half,")


def test_what_a_running_edge_provides_stays(cache: HalfCache) -> None:
    with cache.provide(SOURCE), cache.provide(SOURCE):
        assert {row["source"]: row["state"] for row in json.loads(run("list", "--json"))}[SOURCE] == "complete, in use"
        said = run("clear", SOURCE)
    assert said.count("of source cccccccccccc is in use and stays") == 2 and "cleared 0 halves" in said
    assert kept(cache) == set(KEYS)
    assert run("clear", SOURCE) == "cleared 2 halves, 4.0 MB\n"


def test_the_model_of_an_edge_goes_with_the_last_edge_that_provided_it(cache: HalfCache) -> None:
    assert run("clear", "--edge", "three:3").startswith("cleared 0 halves")
    assert run("clear", "--edge", "one:1").startswith("cleared 0 halves")
    assert KnownEdges(cache.folder).all().keys() == {"two:2"} and kept(cache) == set(KEYS)
    assert run("clear", "--edge", "two:2").startswith("cleared 1 half,")
    assert kept(cache) == set(KEYS[:2])


def test_another_folder_is_looked_at_instead(cache: HalfCache, tmp_path: Path) -> None:
    assert run("clear", "--all", "--cache", str(tmp_path / "none")).startswith("cleared 0 halves")
    assert json.loads(run("list", "--json", "--cache", str(tmp_path / "none"))) == []
    assert kept(cache) == set(KEYS)


@pytest.mark.parametrize("arguments", [[], ["--all", "abc"], ["--all", "--edge", "one:1"]])
def test_what_to_clear_must_be_said_once(cache: HalfCache, arguments: list[str]) -> None:
    with pytest.raises(SettingsError, match="say what to clear"):
        run("clear", *arguments)
    assert kept(cache) == set(KEYS)
