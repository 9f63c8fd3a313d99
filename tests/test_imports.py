"""Who may import whom: the daemons never each other, and what a federation server needs never torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DAEMONS = ("sfl.device", "sfl.edge_server", "sfl.fed_server")
HEAVY = ("torch", "transformers", "peft")
SETTINGS = ("settings.py", "base_settings.py", "federation_settings.py", "connection_settings.py")
LIGHT = (
    *("fed_server", "adapters", "cache", "identity", "watching", "model/packed.py", "wire", *SETTINGS),
    *("telemetry.py", "errors.py", "state_file.py", "__init__.py"),
)
WITH_TORCH = ("wire/split.py", "wire/torch_tensors.py")
CIRCLES = {("device", "planning"), ("device", "profiling")}  # a device plans and records itself by running parts of it


def files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """All modules that a file imports, at its top or inside a function."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            module = node.module or ""
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("daemon", DAEMONS)
def test_a_daemon_imports_no_other(daemon: str) -> None:
    others = [other for other in DAEMONS if other != daemon]
    sources = files(ROOT / daemon.replace(".", "/"))
    assert sources, f"{daemon} has no files: is its name still right?"
    for path in sources:
        assert not [m for m in imports(path) if any(within(m, other) for other in others)], path


def test_no_two_packages_import_each_other() -> None:
    packages = sorted(path.parent.name for path in (ROOT / "sfl").glob("*/__init__.py"))
    used = {
        (package, other)
        for package in packages
        for module in set[str]().union(*map(imports, files(ROOT / "sfl" / package)))
        for other in packages
        if other != package and within(module, f"sfl.{other}")
    }
    assert ("wire", "identity") in used
    assert {(one, other) for one, other in used if one < other and (other, one) in used} == CIRCLES


@pytest.mark.parametrize("part", LIGHT)
def test_what_a_federation_server_needs_names_no_torch(part: str) -> None:
    sources = [path for path in files(ROOT / "sfl" / part) if path.relative_to(ROOT / "sfl").as_posix() not in WITH_TORCH]
    assert sources, f"sfl/{part} has no files: is its name still right?"
    for path in sources:
        assert not [m for m in imports(path) if any(within(m, heavy) for heavy in HEAVY)], path


@pytest.mark.parametrize("module", ["sfl.fed_server.daemon", "sfl.adapters.peft_format", "sfl.wire.federation", "sfl.settings"])
def test_importing_it_loads_no_torch(module: str) -> None:
    script = f"import sys, {module}; print(sorted({set(HEAVY)!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["sfl.device.provision", "sfl.wire.federation", "sfl.wire.own"])
def test_a_device_has_no_memory_for_a_package_that_makes_certificates(module: str) -> None:
    script = f"import sys, {module}; print('cryptography' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "False"
