"""`sfl compare` as a command: its settings from a file and flags, and one line for what is wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfl.cli.load_settings import as_toml, load
from sfl.cli.main import app
from sfl.compare.outcome import Outcome
from sfl.compare.settings import CompareSettings
from sfl.compare.variants import variants
from sfl.errors import SettingsError
from sfl.telemetry import log
from tests.cli.test_main import ROOT, run
from tests.compare.made import outcome, settings

FILE = """
data = "there"
steps = 7
[optimizer]
learning_rate = 3e-3
[fed.strategy]
local_steps = 5
[[run]]
name = "gsfs, no network"
strategy = {name = "gsfs", network = false}
[[run]]
name = "krum"
strategy = "fedavg"
robust = {rule = "krum", attackers = 2}
attack = {kind = "sign-flip", devices = 2}
"""


def test_a_file_and_flags(tmp_path: Path) -> None:
    file = tmp_path / "compare.toml"
    file.write_text(FILE)
    flags = ["--steps", "9", "--cuts", "1,2,3", "--fed", "strategy.local_steps=4,merge=ffa", "--attack-strength", "3"]
    found = load(CompareSettings, file, flags, environment={"SFL_SEEDS": "2"})
    assert (found.steps, found.cuts, found.seeds, found.optimizer.learning_rate) == (9, (1, 2, 3), 2, 3e-3)
    first, second = variants(found)
    assert (first.name, first.fed_settings(3, ("x", "y")).merge) == ("gsfs, no network", "ffa")
    assert (second.settings.attack.kind, second.settings.attack.strength) == ("sign-flip", 3.0)
    assert second.fed_settings(7, ("x", "y")).robust.attackers == 2
    again = tmp_path / "again.toml"
    again.write_text(as_toml(found))
    assert load(CompareSettings, again, environment={}) == found


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.toml")), ids=lambda file: file.stem)
def test_the_benchmarks_are_comparisons(file: Path) -> None:
    found = load(CompareSettings, file, ["--data", "there"], environment={})
    assert all(variant.centralised or variant.fed_settings(found.devices or 7, ("x", "y")) for variant in variants(found))
    assert f"#     sfl compare --config benchmarks/{file.name} --data " in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "data is not set"),
        (["--data", "x", "--strategy", "gsfs"], "did you mean --strategies?"),
        (["--data", "x", "--steps", "0"], "steps = '0' from --steps: should be greater than or equal to 1"),
        (["--data", "x", "--fed", "quorum"], "'quorum' is no NAME=VALUE"),
    ],
)
def test_wrong_settings_are_named(flags: list[str], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(CompareSettings, None, flags, environment={})
    assert message in str(caught.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_comparison_that_is_interrupted_says_what_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    runs = iter([outcome()])

    def run_once(*_: object, **__: object) -> Outcome:
        made = next(runs, None)
        if made is None:
            os.kill(os.getpid(), number)
            time.sleep(10)
            raise AssertionError("not interrupted")
        return made

    monkeypatch.setattr("sfl.compare.compare.run", run_once)
    monkeypatch.setattr(log, "filters", [])  # which the command adds to
    before, file = signal.getsignal(signal.SIGTERM), tmp_path / "compare.toml"
    file.write_text(as_toml(settings(tmp_path, strategies=["fedavg", "gsfs"])))
    result = CliRunner().invoke(app, ["compare", "--config", str(file)])
    assert result.exit_code == 130 and signal.getsignal(signal.SIGTERM) is before
    out = tmp_path / "out"
    assert f"interrupted: 1 of 2 runs are finished and kept in {out}; the same call makes the others" in result.stderr
    again = CliRunner().invoke(app, ["compare", "--config", str(file)])
    assert "1 runs to make, 1 are finished" in again.stderr


def test_the_command_says_what_is_wrong_in_one_line(tmp_path: Path) -> None:
    listing = run("compare", "--help").stdout
    assert "--curve-points" in listing and "sfl compare --show OUT" in listing
    for arguments, message in (
        (["--stes", "3"], "unknown setting --stes"),
        (["--show"], "--show takes the folder of a comparison"),
        (["--show", str(tmp_path)], "holds no finished run of a comparison"),
    ):
        result = run("compare", *arguments)
        assert result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr, result.stderr
