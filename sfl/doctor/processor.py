"""What the processor can do, as far as training cares."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.version import Version

from sfl.doctor.finding import Finding, failed, passed, skipped, warned
from sfl.profiling.board.files import ROOT, text_of
from sfl.profiling.board.identity import identity
from sfl.settings import Compute

# Features as /proc/cpuinfo names them, in the order in which they are told.
_TOLD = (
    *("sse4_2", "avx", "fma", "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    *("asimd", "atomics", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
_TORCH_WITH_ATOMICS = Version("2.10")  # its builds for aarch64 die at import without them: pytorch issue 176993


def check_processor(
    compute: Compute | None = None, root: Path = ROOT, machine: str | None = None, torch: str | None = None
) -> Iterator[Finding]:
    """The processor's name, cores and features; `compute` is the format of activations in force, if any is.

    `root`, `machine` and the version of `torch` are this system's unless given.
    """
    machine = machine or platform.machine()
    torch = torch or _installed("torch")
    found, features = identity(root), cpu_features(root)
    told = ", ".join(name for name in _TOLD if name in features) or "no feature that training cares for"
    line = f"{found.cpu or 'unknown'}, {found.cores or '?'} core{'s' * (found.cores != 1)}, {machine}: {told}"
    if not features:
        yield skipped("processor", f"{machine}: this system does not tell its features")
        return
    if machine == "x86_64" and "avx2" not in features:
        yield warned("processor", line, "without avx2 steps take several times as long: expect that, or lower the cut")
    elif machine == "aarch64" and "atomics" not in features and torch and Version(torch) >= _TORCH_WITH_ATOMICS:
        yield failed(
            "processor",
            f"{line}; torch {torch} needs atomics, which a Raspberry Pi 4 and older boards lack, and would die at import",
            "pip install 'torch>=2.9,<2.10'",
        )
    else:
        yield passed("processor", line)
    if compute == "bf16" and not features & _BF16:
        yield warned(
            "bf16 arithmetic",
            "this processor has no instructions for bf16: it is emulated, and slower than fp32",
            "where memory allows it, set compute to fp32",
        )


def cpu_features(root: Path = ROOT) -> set[str]:
    """Features of the first processor in /proc/cpuinfo."""
    for line in (text_of(root / "proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
