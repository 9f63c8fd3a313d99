"""The folder of a comparison: runs are made once, what is damaged again, and another comparison is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sfl.compare.division import Source
from sfl.compare.job import prepare
from sfl.compare.settings import CompareSettings
from sfl.compare.store import Planned, Store, planned
from sfl.compare.variants import variants
from sfl.errors import SettingsError
from tests.compare.made import outcome, settings


def plan(given: CompareSettings, data: str = "d", model: str = "m") -> list[Planned]:
    source = Source(given)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    jobs = [prepare(given, str(given.model), each, seed, source.division(seed)) for seed in seeds for each in variants(given)]
    return [planned(job, given, data, model) for job in jobs]


def begun(given: CompareSettings, data: str = "d", model: str = "m") -> tuple[Store, list[Planned]]:
    runs = plan(given, data, model)
    store = Store(given.out)
    store.begin(given, data, model, runs)
    return store, runs


def test_what_was_saved_is_there_for_the_next_call(tmp_path: Path) -> None:
    given = settings(tmp_path, strategies=["fedavg", "gsfs"], seeds=2)
    store, runs = begun(given)
    assert len({run.key for run in runs}) == 4 and not any(store.finished(run) for run in runs)
    saved = outcome(0.8, backdoor=0.25)
    store.save(runs[1], saved, {})
    again = Store(given.out)
    assert again.finished(runs[1]) == saved and again.finished(runs[0]) is None
    assert again.outcomes() == {"gsfs": {0: saved}}
    assert plan(settings(tmp_path, strategies=["fedavg", "gsfs"], seeds=2, threads=1, keep=True)) == runs


@pytest.mark.parametrize("content", ["", "{", '{"outcome": {"central": 3}}', '{"outcome": null}'])
def test_a_damaged_run_counts_as_none(tmp_path: Path, content: str) -> None:
    store, runs = begun(settings(tmp_path, strategies=["fedavg"]))
    store.save(runs[0], outcome(), {})
    (store.out / "runs" / f"{runs[0].key}.json").write_text(content)
    assert store.finished(runs[0]) is None and store.outcomes() == {}


def test_runs_and_seeds_can_be_added_and_a_changed_run_takes_the_place_of_the_old(tmp_path: Path) -> None:
    run: dict[str, Any] = {"name": "mine", "strategy": "gsfs"}
    store, runs = begun(settings(tmp_path, strategies=["fedavg"], run=[run]))
    for each in runs:
        store.save(each, outcome(), {})
    store, more = begun(settings(tmp_path, strategies=["fedavg"], first_seed=1))
    store.save(more[0], outcome(), {})
    assert {name: list(seeds) for name, seeds in store.outcomes().items()} == {"fedavg": [0, 1], "mine": [0]}
    store, changed = begun(settings(tmp_path, run=[{**run, "steps": 7}], first_seed=1))
    assert store.outcomes().keys() == {"fedavg"}
    store.save(changed[0], outcome(), {})
    assert {name: list(seeds) for name, seeds in Store(store.out).outcomes().items()} == {"mine": [1], "fedavg": [0, 1]}


@pytest.mark.parametrize(
    ("changes", "data", "model", "message"),
    [
        ({"steps": 7}, "d", "m", "its steps is 6, not 7"),
        ({"fed": {"strategy": {"local_steps": 2}}}, "d", "m", "its fed is "),
        ({}, "other", "m", "its data is d, not other"),
        ({}, "d", "other", "its model is m, not other"),
    ],
)
def test_another_comparison_needs_another_folder(
    tmp_path: Path, changes: dict[str, Any], data: str, model: str, message: str
) -> None:
    begun(settings(tmp_path, strategies=["fedavg"]))
    with pytest.raises(SettingsError, match=f"holds another comparison: {message}.*choose another folder"):
        begun(settings(tmp_path, strategies=["fedavg"], **changes), data, model)


def test_the_key_follows_all_that_determines_a_run(tmp_path: Path) -> None:
    def key(data: str = "d", **changes: Any) -> str:
        return plan(settings(tmp_path, **{"strategies": ["fedavg"], **changes}), data)[0].key

    same = key()
    others = [
        key("other"),
        key(first_seed=1),
        key(optimizer={"learning_rate": 1e-3}),
        key(fed={"strategy": {"local_steps": 2}}),
        key(curve_points=2),
        key(cuts=[1, 2]),
        key(reading={"test": 0.3}),
        key(device={"validation_batches": 1}),
        key(attack={"kind": "scaling", "devices": 1}),
    ]
    assert len({same, *others}) == 10
    assert key(out=tmp_path / "elsewhere", threads=2, seeds=2) == same


def test_other_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for out, message in ((tmp_path / "file", "is a file"), (tmp_path, "holds no comparison")):
        with pytest.raises(SettingsError, match=message):
            Store(out)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "comparison.json").write_text("{}")
    with pytest.raises(SettingsError, match="is damaged"):
        Store(tmp_path / "damaged")
