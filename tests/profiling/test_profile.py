"""`sfl profile` in a process of its own, on a real device half; and a device daemon that records itself."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sfl.cli.main import app
from sfl.errors import SettingsError
from sfl.profiling.result import Profile, read_profile
from sfl.settings import StrategySettings
from tests.daemons.environment import ENVIRONMENT
from tests.daemons.processes import Daemons, sfl
from tests.daemons.runs import device_settings, edge_settings, start_all
from tests.flows import write_texts
from tests.metrics import events
from tests.tiny import save_tiny_model

STEPS = 3
IN_A_STEP = ("forward", "wait", "backward", "step")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "opt", hidden=256, vocab=2000, ffn_dim=1024)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    return subprocess.run(sfl("profile", *arguments), env=environment, capture_output=True, text=True, timeout=110, check=False)


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a profile and its picture, and what was printed."""
    out = tmp_path_factory.mktemp("out")
    shape = ("--cut", "2", "--batch-size", "4", "--max-length", "128", "--steps", str(STEPS), "--rank", "4", "--memory", "4000")
    result = run("--model", str(model), *shape, "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_parts_add_up_to_the_peak(made: tuple[Path, str]) -> None:
    profile = read_profile(made[0] / "profile.json")
    parts = {part.name: part.mb for part in profile.parts}
    assert sum(mb for mb in parts.values() if mb is not None) == pytest.approx(profile.peak.rss_mb)
    assert next(iter(parts)) == "process floor" and list(parts)[-1] == "allocator and kernels"
    assert parts["process floor"] == pytest.approx(profile.moments["after the imports"].rss_mb, rel=0.05)
    # Two blocks with attention (4 x 256 x 256) and two linear layers of 256 x 1024, of which q and v have LoRA of rank 4.
    blocks, adapter = 2 * (4 * 256**2 + 2 * 256 * 1024) * 4 / 1e6, 2 * 2 * 2 * 4 * 256 * 4 / 1e6
    assert parts["weights"] == pytest.approx(blocks, rel=0.1)
    assert parts["adapter"] == pytest.approx(2 * adapter)  # and the anchor
    # What else there is depends on where the peak falls, and with so small a model any phase of any step may have it.
    phase, step = profile.peak.phase, profile.peak.step
    assert phase in (*IN_A_STEP, "idle")
    assert parts["gradients"] == pytest.approx(adapter if phase in ("backward", "step") else 0)
    assert parts["optimiser"] == pytest.approx(2 * adapter if step > 1 or phase == "step" else 0, rel=0.01)
    activation = 4 * 128 * 256 * 4 / 1e6
    assert parts["wire buffers"] == pytest.approx({"forward": 0, "wait": 2 * activation}.get(phase, activation), abs=0.02)
    if phase in ("forward", "wait", "backward"):
        assert parts["activations"] > 8 * activation and parts["temporaries"] > activation


def test_phases_and_moments(made: tuple[Path, str]) -> None:
    profile = read_profile(made[0] / "profile.json")
    phases = {phase.name: phase for phase in profile.phases}
    assert set(phases) == {"import", "load", "tokenise", *IN_A_STEP, "idle", "count"}
    assert all(phases[name].count == STEPS for name in IN_A_STEP)
    assert profile.peak.rss_mb == pytest.approx(max(phase.peak_mb for name, phase in phases.items() if name != "count"))
    assert profile.peak.exact and profile.peak.phase in (*IN_A_STEP, "idle") and 1 <= profile.peak.step <= STEPS
    assert all(phase.mean_mb <= phase.peak_mb + 0.5 for phase in phases.values())
    assert sum(phase.seconds for phase in phases.values()) == pytest.approx(profile.seconds, abs=0.5)
    aside = [(span.start_s, span.end_s) for span in profile.spans if span.phase == "count"]
    measured = [mb for at_s, mb in profile.rss if not any(start <= at_s <= end for start, end in aside)]
    assert max(measured) <= profile.peak.rss_mb + 1
    assert {"after the imports", "after loading", "after the phase of the peak", "at the end"} == set(profile.moments)
    for moment in profile.moments.values():
        assert 0 < moment.uss_mb <= moment.pss_mb <= moment.rss_mb
        assert moment.arena_mb is None or moment.used_mb + moment.free_mb == pytest.approx(moment.arena_mb, rel=0.01)
    assert profile.limit_mb == 4000
    assert profile.settings["rank"] == 4 and profile.settings["steps"] == STEPS


def test_what_is_printed_drawn_and_read_again(made: tuple[Path, str]) -> None:
    out, printed = made
    assert "parts of the peak" in printed and "backward" in printed and "to spare" in printed
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")
    profile = read_profile(out / "profile.json")
    assert Profile.from_json(profile.to_json()) == profile
    again = run("--read", str(out / "profile.json"), "--json", "-", "--png", str(out / "again.png"))
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout) == json.loads((out / "profile.json").read_text(encoding="utf-8"))
    assert (out / "again.png").stat().st_size > 10_000


def test_without_matplotlib_only_the_picture_is_missing(
    made: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sfl.cli.profile.find_spec", lambda name: None)
    arguments = ["profile", "--read", str(made[0] / "profile.json")]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0 and "parts of the peak" in result.stdout
    assert "profile.png is left out: it needs matplotlib, which is not installed: pip install" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]
    with pytest.raises(SettingsError, match="--png needs matplotlib"):
        CliRunner().invoke(app, [*arguments, "--png", str(tmp_path / "x.png")], catch_exceptions=False)


def test_bad_input(model: Path, tmp_path: Path) -> None:
    (tmp_path / "old.json").write_text('{"format": 1}', encoding="utf-8")
    cases = {
        ("--model", str(model), "--cut", "4"): "a cut is between 1 and 3",
        ("--model", str(model), "--pid", "1"): "give one of --model, --pid and --read",
        ("--model", str(model), "--png", str(tmp_path / "no" / "x.png")): "there is no folder",
        ("--read", str(tmp_path / "none.json")): "cannot be read",
        ("--read", str(tmp_path / "old.json")): "this is no profile",
    }
    for arguments, message in cases.items():
        result = run(*arguments)
        assert (result.returncode, result.stdout) == (2, ""), result.stderr
        assert message in result.stderr and "Traceback" not in result.stderr


def test_another_format_is_refused(made: tuple[Path, str]) -> None:
    text = (made[0] / "profile.json").read_text(encoding="utf-8").replace('"format": 1', '"format": 99')
    with pytest.raises(SettingsError, match="format 99"):
        Profile.from_json(text)


def test_a_daemon_records_itself_until_it_is_stopped(model: Path, tmp_path: Path) -> None:
    data = write_texts(tmp_path / "texts.txt", 120)
    device = device_settings("device-1", model, data, cut=2, steps=100_000, profile=True)
    with Daemons(tmp_path / "run") as daemons:
        start_all(daemons, StrategySettings(name="fedavg", local_steps=100_000), [edge_settings("edge", device)], [device])
        out, process = daemons["device-1"].out, daemons["device-1"].process
        deadline = time.monotonic() + 90
        while not (out / "metrics.jsonl").exists() or sum(event["event"] == "step" for event in events(out)) < 4:
            assert time.monotonic() < deadline and process.poll() is None, daemons["device-1"].log
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0  # it stops in order, after its step
        assert "stopped at step" in daemons["device-1"].log
    profile = read_profile(out / "profile.json")
    phases = {phase.name: phase for phase in profile.phases}
    assert {"import", "load", "tokenise", *IN_A_STEP} <= set(phases)
    assert all(phases[name].count >= 3 for name in IN_A_STEP)
    parts = {part.name: part.mb for part in profile.parts}
    assert sum(mb for mb in parts.values() if mb is not None) == pytest.approx(profile.peak.rss_mb)
    assert profile.peak.step >= 1 and parts["weights"] > 0 and parts["activations"] > 0
    # A write that was torn off would leave its name.
    assert not list(out.glob("*.partial"))
