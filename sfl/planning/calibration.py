"""What only a measurement tells about a machine: the memory of a process that holds no model, and how fast it computes."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from sfl.errors import SettingsError
from sfl.settings import Precision

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8", "nf4")
MARGIN = 0.10  # of a predicted peak, which may be so far from the true one
_PACKAGES = ("torch", "transformers", "peft")


def installed_versions() -> dict[str, str]:
    """The packages on which a calibration depends, and their versions here."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "none"
    return found


@dataclass(frozen=True)
class Calibration:
    """Constants of the memory model and speeds, by precision of the base.

    `floor_mb`: resident memory (MB) of a device that trains a model of next to no size: imports, code that computing pages
    in, gRPC. `edge_floor_mb`: the same of an edge server. `gflops`: 10**9 floating-point operations in a second of training
    one block; empty where not measured. `versions`: of the packages with which it was measured; `source` says where.
    """

    floor_mb: dict[str, float]
    edge_floor_mb: float
    gflops: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    source: str = ""

    @property
    def stale(self) -> str | None:
        """What has another version here than where this was measured, in words; None if nothing."""
        here = installed_versions()
        changed = [
            f"{name} {version}, not {here[name]}" for name, version in self.versions.items() if here.get(name, version) != version
        ]
        return f"it was measured with {' and '.join(changed)}" if changed else None


DEFAULT = Calibration(
    floor_mb={"fp32": 323.0, "bf16": 332.0, "int8": 333.0, "nf4": 336.0},
    edge_floor_mb=400.0,
    source="defaults measured on x86-64 with torch 2.13 and transformers 5.23",
)


def calibration_file() -> Path:
    """Where this machine's calibration is kept: sfl/calibration.json in XDG_CACHE_HOME or ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(cache) if cache else Path.home() / ".cache") / "sfl" / "calibration.json"


def read_calibration(path: Path | None = None) -> Calibration:
    """This machine's calibration, else the defaults. Raises `SettingsError` for a file that is damaged."""
    path = path or calibration_file()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return DEFAULT
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"the calibration {path} cannot be read ({error}): remove it or run `sfl plan --calibrate`"
        ) from error
    try:
        found = Calibration(
            floor_mb=_numbers(content["floor_mb"]),
            edge_floor_mb=float(content["edge_floor_mb"]),
            gflops=_numbers(content["gflops"]),
            versions={str(name): str(version) for name, version in content["versions"].items()},
            source=f"measured on this machine ({path})",
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SettingsError(f"{path} is no calibration ({error}): run `sfl plan --calibrate`") from error
    return replace(found, floor_mb={**DEFAULT.floor_mb, **found.floor_mb})


def write_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Keep it for the plans to come; returns where. The file is there as a whole or not at all."""
    path = path or calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {name: value for name, value in asdict(calibration).items() if name != "source"}
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    found = {str(name): float(value) for name, value in values.items()}
    if not all(name in PRECISIONS and 0 < value < math.inf for name, value in found.items()):
        raise ValueError(f"unknown precisions or impossible numbers in {values}")
    return found
