"""What the doctor says of a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sfl.doctor import kernels, packages, room
from sfl.doctor.finding import Finding
from sfl.doctor.kernels import check_precisions, try_precisions
from sfl.doctor.packages import check_packages
from sfl.doctor.processor import check_processor
from sfl.doctor.room import check_device_disks, check_disk, check_memory, check_plan
from sfl.errors import MemoryShortError
from sfl.planning.apart import ChosenCut
from sfl.settings import DeviceSettings


def installed(monkeypatch: pytest.MonkeyPatch, needed: list[str], versions: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(packages.metadata, "requires", lambda name: needed)
    monkeypatch.setattr(packages.metadata, "version", version)


NEEDED = [
    "grpcio<2,>=1.81.1",
    "tomli>=2; python_version < '3.0'",
    "torch<2.14,>=2.9; extra == 'train'",
    "bitsandbytes<1,>=0.50; extra == 'quant'",
    "sfl[train]; extra == 'train'",
]


def test_packages_are_held_against_what_this_kind_of_daemon_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, NEEDED, {"grpcio": "1.85.1", "torch": "2.13.0+cpu"})
    assert [(each.state, each.found) for each in check_packages(())][1:] == [("passed", "grpcio 1.85.1")]
    assert [(each.state, each.found) for each in check_packages(("train",))][1:] == [
        ("passed", "grpcio 1.85.1, torch 2.13.0+cpu")
    ]
    wrong = [each for each in check_packages(("train", "quant")) if each.state == "failed"]
    assert [(each.found, each.advice) for each in wrong] == [
        ("bitsandbytes is not installed", "pip install 'bitsandbytes<1,>=0.50'")
    ]


def test_a_device_may_lack_what_only_servers_import(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["grpcio<2,>=1.81.1", "cryptography>=43"]
    installed(monkeypatch, needed, {"grpcio": "1.85.1"})
    assert [each.state for each in check_packages((), packages.NOT_ON_A_DEVICE)] == ["passed", "passed"]
    assert [each.state for each in check_packages(())] == ["passed", "failed", "passed"]
    installed(monkeypatch, needed, {"grpcio": "1.85.1", "cryptography": "42.0"})
    assert [each.state for each in check_packages((), packages.NOT_ON_A_DEVICE)] == ["passed", "failed", "passed"]


@pytest.mark.parametrize("version", ["1.80.0", "2.0.0"])
def test_a_package_of_another_version_fails(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    installed(monkeypatch, NEEDED, {"grpcio": version})
    found = [each for each in check_packages(()) if each.state == "failed"]
    assert [(each.found, each.advice) for each in found] == [(f"grpcio is {version}", "pip install 'grpcio<2,>=1.81.1'")]


def test_sfl_from_a_folder_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.metadata, "requires", requires)
    assert [each.state for each in check_packages(())] == ["passed", "warned"]


def cpu(folder: Path, text: str) -> Path:
    (folder / "proc").mkdir(parents=True)
    (folder / "proc" / "cpuinfo").write_text(text)
    return folder


X86 = "processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {}\n\nprocessor\t: 1\nmodel name\t: Some CPU\nflags\t\t: fpu\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\nCPU implementer\t: 0x41\nCPU part\t: {}\n"


@pytest.mark.parametrize(
    ("text", "machine", "torch", "compute", "states", "says"),
    [
        (X86.format("avx2 avx512_bf16"), "x86_64", "2.13.0", "bf16", ["passed"], "Some CPU, 2 cores, x86_64: avx2, avx512_bf16"),
        (X86.format("sse4_2"), "x86_64", "2.13.0", "fp32", ["warned"], "sse4_2"),
        (X86.format("avx2"), "x86_64", "2.13.0", "bf16", ["passed", "warned"], "avx2"),
        (ARM.format("", "0xd08"), "aarch64", "2.9.1", "fp32", ["passed"], "Cortex-A72, 1 core, aarch64: asimd"),
        (ARM.format("", "0xd08"), "aarch64", "2.10.0", "fp32", ["failed"], "needs atomics"),
        (ARM.format("atomics asimddp", "0xd0b"), "aarch64", "2.12.0", "fp32", ["passed"], "Cortex-A76"),
        ("", "aarch64", None, None, ["skipped"], "does not tell"),
    ],
)
def test_processors(tmp_path: Path, text: str, machine: str, torch: Any, compute: Any, states: list[str], says: str) -> None:
    found = list(check_processor(compute, cpu(tmp_path, text), machine, torch))
    assert [each.state for each in found] == states
    assert says in found[0].found
    assert all(each.advice for each in found if each.state in ("warned", "failed"))


def answers(*results: tuple[int, list[str | None]]) -> Callable[..., Any]:
    """Stands for processes that try formats: exit code, and why each of the formats that they came to does not run."""
    left = list(results)

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        code, reasons = left.pop(0)
        text = "".join(json.dumps({"seconds": 0.001, "why": why}) + "\n" for why in reasons)
        return subprocess.CompletedProcess(command, code, text, "Traceback\nImportError: no torch\n" if code > 0 else "")

    return run


def test_an_instruction_that_the_processor_lacks_costs_one_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.subprocess, "run", answers((-4, [None]), (0, [None, "no bitsandbytes"])))
    found = try_precisions("cpu")
    assert {name: answer["why"] for name, answer in found.items()} == {
        "fp32": None,
        "bf16": "the process that tried it was ended by SIGILL",
        "int8": None,
        "nf4": "no bitsandbytes",
    }


def test_without_torch_every_format_says_so_and_the_one_that_is_needed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.subprocess, "run", answers(*[(1, [])] * 4))
    found = {each.name: each for each in check_precisions("int8")}
    assert {name: each.state for name, each in found.items()} == {
        "precision fp32": "warned",
        "precision bf16": "warned",
        "precision int8": "failed",
        "precision nf4": "warned",
    }
    assert "ImportError: no torch" in found["precision int8"].found


def test_the_formats_really_run_here() -> None:
    found = try_precisions("cpu", ("fp32", "int8"))
    assert [answer["why"] for answer in found.values()] == [None, None]
    assert all(0 < answer["seconds"] < 60 for answer in found.values())
    command = [sys.executable, "-m", "sfl.doctor.kernels", "cuda", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    why = json.loads(done.stdout)["why"]
    assert why is None or "no GPU" in why


def test_memory_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for free, state in ((None, "skipped"), (300.0, "warned"), (900.0, "passed")):
        monkeypatch.setattr(room, "available_memory", lambda free=free: free)
        assert check_memory().state == state


def device(**changes: Any) -> DeviceSettings:
    return DeviceSettings.model_validate({"name": "pi-1", "data": {"path": "none"}, "model": "m", "cut": 2, **changes})


@pytest.mark.parametrize(
    ("device_mb", "state", "says"),
    [
        (400.0, "passed", "cut 2 takes 400 MB at most by the plan, 900 MB can be had"),
        (850.0, "warned", "less than the plan's own error|cut 2 takes 850 MB"),
        (None, "warned", "900 MB can be had"),
    ],
)
def test_memory_against_the_plan(monkeypatch: pytest.MonkeyPatch, device_mb: Any, state: str, says: str) -> None:
    chosen = None if device_mb is None else ChosenCut(2, device_mb)
    monkeypatch.setattr(room, "available_memory", lambda: 900.0)
    monkeypatch.setattr(room, "choose_cut_apart", lambda *given: chosen)
    found, same = check_plan(device(), "m")
    assert (found.state, same) == (state, chosen)
    assert any(part in f"{found.found} {found.advice}" for part in says.split("|"))


def test_a_cut_that_does_not_fit_fails_with_the_planners_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(*given: Any) -> ChosenCut:
        raise MemoryShortError("cut 2 does not fit 200 MB: it needs 341 MB")

    monkeypatch.setattr(room, "available_memory", lambda: 200.0)
    monkeypatch.setattr(room, "choose_cut_apart", choose)
    found, chosen = check_plan(device(), "m")
    assert found == Finding(
        "failed", "memory", "cut 2 does not fit 200 MB: it needs 341 MB", "sfl errors SFL-104 says more", "SFL-104"
    )
    assert chosen is None


def test_disks(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    assert [each.state for each in check_disk("out", tmp_path / "a" / "b")] == ["passed"]
    assert [each.state for each in check_disk("out", tmp_path / "file" / "b")] == ["failed"]
    assert [each.state for each in check_disk("out", tmp_path, 1e12)] == ["failed"]
    assert [each.state for each in check_disk("cache", tmp_path, 1e12, must=False)] == ["warned"]
    assert not (tmp_path / "a").exists(), "looking leaves nothing behind"


def test_a_devices_disks_against_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room.shutil, "disk_usage", lambda folder: SimpleNamespace(free=400e6))

    def looked(chosen: ChosenCut | None, provided: Path | None = None, **changes: Any) -> list[tuple[str, str]]:
        settings = device(out=tmp_path, cache=tmp_path, cache_limit_mb=1000, **changes)
        return [(each.name, each.state) for each in check_device_disks(settings, chosen, provided)]

    small, large = ChosenCut(2, 300.0, half_mb=390.0, checkpoint_mb=90.0), ChosenCut(2, 300.0, half_mb=410.0, checkpoint_mb=110.0)
    assert looked(small) == looked(None) == [("disk of out", "passed")]
    assert looked(large) == [("disk of out", "failed")], "three checkpoints and what is spared are more"
    assert looked(small, model=None) == [("disk of out", "passed"), ("disk of cache", "passed")]
    assert looked(large, model=None) == [("disk of out", "failed"), ("disk of cache", "failed")]
    assert looked(large, tmp_path, model=None)[1] == ("disk of cache", "passed"), "it is there"
    assert looked(None, model=None)[1] == ("disk of cache", "warned"), "all that the cache may have"
