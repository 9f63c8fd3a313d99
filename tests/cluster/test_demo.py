"""`sfl demo` with all its processes, on a tiny model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel

from sfl.adapters.peft_format import read_layout
from sfl.model.load import load_task_model
from tests.flows import write_texts
from tests.metrics import events
from tests.tiny import save_tiny_model

DEVICE_KEYS = {
    "name", "cut", "steps", "examples", "submissions", "bytes_sent", "bytes_received", "peak_rss_mb", "accuracy", "f1_macro",
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """A tiny model, and the data of three devices with different labels."""

    model: Path
    data: tuple[Path, Path, Path]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("demo")
    first, second, third = (
        write_texts(folder / f"{i}.txt", 90, seed=i, labels=labels)
        for i, labels in enumerate([("Benign", "C&C"), ("Benign", "DDoS"), ("Benign",)])
    )
    return Inputs(save_tiny_model(folder / "model", "bert"), (first, second, third))


def start(inputs: Inputs, out: Path, *more: str, files: int = 3) -> subprocess.Popen[str]:
    """`sfl demo` on the first so many files of the data, one device each unless `more` says otherwise."""
    data = (flag for file in inputs.data[:files] for flag in ("--data", str(file)))
    flags = ["--model", str(inputs.model), "--max-length", "24", "--batch-size", "4", *data]
    command = [sys.executable, "-m", "sfl.cli.main", "demo", *flags, "--out", str(out), *more]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "SFL_STEPS": "1000000",
    }  # settings of the environment are not for the demo
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    try:
        stdout, stderr = process.communicate(timeout=110)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


def daemons_of(out: Path) -> list[psutil.Process]:
    """Running processes that were given a configuration file in `out`."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        arguments = " ".join(process.info["cmdline"] or ())
        if f"{out}/" in arguments and "--config" in arguments and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_a_whole_run(inputs: Inputs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ("--json", "--devices", "4", "--edges", "2", "--cut", "1,2,3", "--steps", "12", "--seed", "3")
    code, stdout, stderr = finish(start(inputs, out, *more))
    assert code == 0, stderr
    summary: dict[str, Any] = json.loads(stdout)
    assert summary == json.loads((out / "summary.json").read_text())
    assert {"strategy", "model", "task", "wall_s", "central", "devices", "edges", "fed"} <= summary.keys()
    assert [(device["name"], device["cut"], device["steps"]) for device in summary["devices"]] == [
        ("device-1", 1, 12), ("device-2", 2, 12), ("device-3", 3, 12), ("device-4", 1, 12),
    ]  # fmt: skip
    for device in summary["devices"]:
        assert device.keys() >= DEVICE_KEYS
        assert 0 <= device["accuracy"] <= 1 and device["bytes_sent"] > 10_000 and device["peak_rss_mb"] > 50
        steps = events(out / device["name"], "step")
        assert [event["step"] for event in steps] == list(range(1, 13))
        assert device["examples"] == sum(event["examples"] for event in steps)
        assert device["submissions"] == len(events(out / device["name"], "submit")) >= 1
    assert sum(edge["steps"] for edge in summary["edges"]) == 48 and all(edge["bytes_received"] for edge in summary["edges"])
    fed = summary["fed"]
    assert fed["version"] == fed["aggregations"] == len(events(out / "fed", "aggregate")) >= 1
    assert fed["submissions"] == sum(device["submissions"] for device in summary["devices"])
    assert {folder.name for folder in (out / "adapters").iterdir()} >= {f"v{i}" for i in range(fed["version"] + 1)}
    assert summary["adapter"] == str(out / "adapters" / f"v{fed['version']}")
    layout = read_layout(Path(summary["adapter"]))
    assert layout.labels == ("Benign", "C&C", "DDoS") and layout.columns == ()  # texts, not flows
    PeftModel.from_pretrained(load_task_model(summary["model"], "classification", layout.labels), summary["adapter"])
    assert torch.isfinite(torch.tensor(summary["central"]["loss"])) and summary["central"]["count"] > 0
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not daemons_of(out)


@pytest.mark.parametrize("what", ["interrupt", "kill a device"])
def test_what_ends_a_run_ends_all_of_it(inputs: Inputs, tmp_path: Path, what: str) -> None:
    out = tmp_path / "out"
    process = start(inputs, out, "--steps", "100000", files=2)
    deadline = time.monotonic() + 90
    while not (out / "device-2/metrics.jsonl").is_file() or '"step"' not in (out / "device-2/metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.1)
    assert len(daemons_of(out)) == 4
    if what == "interrupt":
        process.send_signal(signal.SIGINT)
    else:
        next(each for each in daemons_of(out) if "device-2" in " ".join(each.cmdline())).kill()
    code, stdout, stderr = finish(process)
    assert not daemons_of(out) and stdout == "" and not (out / "summary.json").exists()
    assert "Traceback" not in stderr
    if what == "interrupt":
        assert code == 130 and "all daemons were stopped" in stderr
    else:
        assert code == 1 and "device-2 was killed by SIGKILL" in stderr and "device-2/log.txt" in stderr


def test_a_daemon_that_cannot_start_is_named(inputs: Inputs, tmp_path: Path) -> None:
    code, stdout, stderr = finish(start(inputs, tmp_path / "out", "--cut", "4", files=1))
    assert code == 1 and stdout == "" and "Traceback" not in stderr
    assert "a cut is between 1 and 3" in stderr and "/log.txt" in stderr
    assert not daemons_of(tmp_path / "out")
