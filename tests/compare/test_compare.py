"""Whole comparisons on tiny models: every figure is there, finished runs are not made again, and bad input is named."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sfl.compare import compare as module
from sfl.compare.compare import compare
from sfl.compare.outcome import Outcome
from sfl.compare.progress import Progress
from sfl.compare.report import headline, write_report
from sfl.compare.settings import CompareSettings
from sfl.compare.store import Store
from sfl.errors import DataError, SettingsError, SflError
from tests.compare.made import settings
from tests.flows import write_texts

ROOT = Path(__file__).parents[2]
SHOW = """
import sys
from sfl.cli.main import main
sys.argv = ["sfl", "compare", "--show", sys.argv[1]]
try:
    main()
finally:
    heavy = {"torch", "transformers", "peft", "matplotlib"} & set(sys.modules)
    if heavy: sys.exit(f"imported {heavy}")
"""


def run(given: CompareSettings) -> tuple[Store, list[str], str]:
    text = io.StringIO()
    store, failed = compare(given, Progress(Console(file=text, width=200)))
    return store, failed, text.getvalue()


def same(first: Outcome, second: Outcome) -> bool:
    """Whether two outcomes agree in all that no clock decides."""
    timed = {"latency_s", "split_latency_s", "wall_s", "curve"}
    values = [{name: value for name, value in vars(outcome).items() if name not in timed} for outcome in (first, second)]
    curves = [[(point.version, point.bytes_received, point.scores) for point in outcome.curve] for outcome in (first, second)]
    return values[0] == values[1] and curves[0] == curves[1]


def test_a_comparison_is_made_once_and_told_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = {"kind": "backdoor", "devices": 1, "trigger": "fox", "strength": 2}
    runs: list[dict[str, Any]] = [
        {"name": "slow link", "strategy": "fedavg", "mbit_s": [1], "cuts": [1, 2, 3]},
        {"name": "attacked", "strategy": "fedavg", "attack": attack},
    ]
    given = settings(tmp_path, strategies=["centralised", "fedavg", "gsfs"], run=runs, keep=True)
    store, failed, text = run(given)
    assert failed == [] and text.startswith("5 runs to make\nrun 1 of 5: centralised, seed 0, 18 steps\n")
    found = {name: by_seed[0] for name, by_seed in store.outcomes().items()}
    assert list(found) == ["centralised", "fedavg", "gsfs", "slow link", "attacked"]
    for outcome in found.values():
        assert outcome.curve[-1].scores.loss == pytest.approx(outcome.central.loss)
        assert outcome.curve[0].version == 0 and outcome.curve[-1].version == outcome.versions
        assert outcome.curve[0].scores == found["fedavg"].curve[0].scores  # all begin alike
        assert outcome.steps == 18 and outcome.test == sum(device.test for device in outcome.devices)
        weighted = sum(device.central_accuracy * device.test for device in outcome.devices) / outcome.test
        assert weighted == pytest.approx(outcome.central.accuracy)
        assert len(outcome.curve) <= 3 and outcome.latency_s > 0
    assert found["centralised"].fed_received is None and found["centralised"].devices[0].own is None
    assert found["centralised"].curve[-1].steps == 18
    assert found["fedavg"].submissions == 6 and found["fedavg"].versions == 2 and found["fedavg"].split_latency_s
    bytes_up = [point.bytes_received for point in found["fedavg"].curve]
    assert bytes_up == sorted(bytes_up) and bytes_up[-1] == found["fedavg"].fed_received
    assert found["slow link"].simulated_s > found["fedavg"].simulated_s == pytest.approx(0.6)
    assert [device.cut for device in found["slow link"].devices] == [1, 2, 3]
    assert found["slow link"].central.loss == pytest.approx(found["fedavg"].central.loss, rel=1e-4)  # cuts change nothing
    assert sum(device.attacker for device in found["attacked"].devices) == 1
    assert found["attacked"].backdoor is not None and found["fedavg"].backdoor is None

    files = write_report(store)
    assert {"compare.json", "compare.md", "accuracy_over_bytes.png"} <= {path.name for path in files}
    document = json.loads((given.out / "compare.json").read_text())
    assert [row["name"] for row in document["variants"]] == list(found)
    assert headline(store).startswith("3 devices, ") and headline(store) in (given.out / "compare.md").read_text()
    kept = [path for path in (given.out / "runs").iterdir() if path.is_dir()]
    assert len(kept) == 5 and all((path / "adapters" / "v0").is_dir() for path in kept)

    damaged = next(entry for entry in store.planned if entry.name == "gsfs")
    (given.out / "runs" / f"{damaged.key}.json").write_text("{")
    store, failed, text = run(given)
    assert text.startswith("1 runs to make, 4 are finished\nrun 1 of 1: gsfs") and failed == []
    assert same(store.outcomes()["gsfs"][0], found["gsfs"])

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(module, "run", never)
    assert same(run(given)[0].outcomes()["gsfs"][0], found["gsfs"])

    shown = subprocess.run(
        [sys.executable, "-c", SHOW, str(given.out)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert all(name in shown.stdout for name in found) and "how good" in shown.stdout


def test_a_run_that_fails_is_named_and_the_others_are_made(tmp_path: Path) -> None:
    too_fast = {"name": "too fast", "strategy": "fedavg", "optimizer": {"name": "sgd", "learning_rate": 1e30}}
    store, failed, _ = run(settings(tmp_path, run=[too_fast, {"name": "good", "strategy": "fedavg"}]))
    assert failed == ["too fast, seed 0"] and list(store.outcomes()) == ["good"]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"strategies": ["fedsgd"]}, SettingsError, "run 'fedsgd': strategy.name = 'fedsgd'"),
        ({"cuts": [1, 2, 3, 1]}, SettingsError, "run 'fedavg' has 4 cuts for 3 devices"),
        ({"device": {"batch_sise": 3}}, SettingsError, "the devices of run 'fedavg': batch_sise"),
        ({"reading": {"test": 0}}, DataError, "set reading.test above 0"),
        ({"data": Path("nowhere")}, DataError, "there is no data file or folder nowhere"),
        ({"attack": {"kind": "scaling", "devices": 3}}, SettingsError, "leave nobody to attack"),
    ],
)
def test_bad_input_is_named_before_anything_is_made(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = settings(tmp_path, **{"strategies": ["fedavg"], **changes})
    with pytest.raises(error, match=message):
        run(given)
    assert not given.out.exists()


def test_a_trigger_that_is_cut_off_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    given = settings(tmp_path, strategies=["fedavg"], attack={"kind": "backdoor", "devices": 1}, max_length=4)
    assert run(given)[1] == ["fedavg, seed 0"]
    assert "lose the backdoor's trigger at their end: raise max_length" in caplog.text


def test_one_label_is_too_few(tmp_path: Path) -> None:
    for number in range(2):
        write_texts(tmp_path / "data" / f"benign-{number}.txt", 60, labels=("Benign",))
    with pytest.raises(DataError, match="holds only one label, 'Benign'"):
        run(settings(tmp_path))


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    with pytest.raises(SflError, match="holds no finished run yet"):
        write_report(Store(tmp_path))
