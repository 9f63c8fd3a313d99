"""What images are built from: locks that fit pyproject.toml, a Dockerfile for every engine and machine, units for systemd."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from sfl.connection_settings import LimitSettings
from tests.docker.files import DOCKER, ROLES, ROOT

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

UNITS = sorted((ROOT / "packaging" / "systemd").glob("*.service"))
NEVER_ON_A_DEVICE = {"cryptography", "grpcio-health-checking"}


def locked(name: str, machine: str) -> dict[str, str]:
    lines = (DOCKER / "locks" / f"{name}.{machine}.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs)
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def shown_limits() -> LimitSettings:
    """What the page on systemd has a server's settings say."""
    _, _, section = (ROOT / "docs" / "containers.md").read_text(encoding="utf-8").partition("## Without containers: systemd")
    (shown,) = re.findall(r"^```toml\n(.*?)^```", section.partition("\n## ")[0], re.M | re.S)
    return LimitSettings.model_validate(tomllib.loads(shown)["limits"])


def required(machine: str, *extras: str, python: str = "3.11") -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    here = {"platform_machine": machine, "python_version": python}
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate(here)]


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize("role", ROLES)
def test_a_lock_has_what_its_role_needs(role: str, machine: str) -> None:
    found = locked(role, machine)
    for each in required(machine, *(() if role == "fed" else ("train", "quant"))):
        name = each.name.lower().replace("_", "-")
        if role == "device" and name in NEVER_ON_A_DEVICE:
            assert name not in found
        else:
            assert each.specifier.contains(found[name]), f"{each} is locked at {found[name]}: run docker/lock.sh"
    assert ("torch" in found) == (role != "fed")
    assert not [name for name in found if name.startswith(("nvidia-", "cuda-"))]


def test_a_jetson_takes_the_torch_of_its_base() -> None:
    found = locked("jetson", "aarch64")
    assert "torch" not in found
    for each in required("aarch64", "train", python="3.10"):
        if each.name not in (*NEVER_ON_A_DEVICE, "torch"):
            assert each.specifier.contains(found[each.name.lower().replace("_", "-")])


def test_a_jetsons_torch_is_nvidias_with_what_it_lacks_there() -> None:
    """PyPI has a torch of the same version for processors, and its tag is the one that pip likes better."""
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", (DOCKER / "Dockerfile.jetson").read_text(encoding="utf-8"), re.MULTILINE))
    (torch,) = (each for each in required("aarch64", "train", python="3.10") if each.name == "torch")
    assert torch.specifier.contains(arguments["TORCH"].partition("==")[2])
    assert arguments["CUDSS"].partition("==")[2].startswith("0."), "libcudss.so.0 is what that torch wants"
    installs = re.findall(r'^ *install (.*"\$[23]")$', (DOCKER / "install.sh").read_text(encoding="utf-8"), re.MULTILINE)
    assert installs[:2] == ['${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$2"', '"$3"']


@pytest.mark.parametrize(("name", "user"), [("Dockerfile", "10001:10001"), ("Dockerfile.jetson", "10001")])
def test_images_do_not_run_as_root(name: str, user: str) -> None:
    """On a Jetson without a group, as with one the user would have no other: not video either, whose the GPU is."""
    text = (DOCKER / name).read_text(encoding="utf-8")
    users = re.findall(r"^USER (\S+)", text, re.MULTILINE)
    assert users == [user]
    assert "--mount" not in text  # builders without BuildKit do not know it
    assert text.count("HEALTHCHECK") == (3 if name == "Dockerfile" else 1)


def test_the_dockerfile_does_not_depend_on_the_machine() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"x86_64|aarch64|--platform|/linux-gnu", text)


@pytest.mark.parametrize("script", sorted(DOCKER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_can_be_read(script: Path) -> None:
    shell = script.read_text(encoding="utf-8").splitlines()[0].rpartition("/")[2].split()[-1]
    assert subprocess.run([shell, "-n", script], timeout=10).returncode == 0


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_units_are_valid_and_hardened(unit: Path, tmp_path: Path) -> None:
    parser = configparser.ConfigParser(strict=True, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]  # names as they are
    parser.read(unit)
    service = parser["Service"]
    role = unit.stem.removeprefix("sfl-")
    assert service["ExecStart"].endswith(f"sfl {role} --config /etc/sfl/{role}.toml")
    assert service["StateDirectory"] == f"sfl/{role}"
    assert (service["User"], service["Restart"], service["RestartPreventExitStatus"]) == ("sfl", "on-failure", "2")
    assert (service["NoNewPrivileges"], service["ProtectSystem"], service["CapabilityBoundingSet"]) == ("yes", "strict", "")
    memory = int(service["MemoryMax"][:-1]) * {"M": 2**20, "G": 2**30}[service["MemoryMax"][-1]]
    assert role == "device" or 2 * shown_limits().in_flight_mb * 1e6 <= memory / 2, "of two nodes"
    assert role == "device" or int(service["LimitNOFILE"]) > LimitSettings().connections
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text(encoding="utf-8").replace("/opt/sfl/bin/sfl", "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
