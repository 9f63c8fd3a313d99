"""Versions of Python and of the packages, against what this version of sfl needs."""

from __future__ import annotations

import platform
from collections.abc import Collection, Iterable, Iterator, Sequence
from importlib import metadata

from packaging.requirements import Requirement

from sfl import __version__
from sfl.doctor.finding import Finding, failed, passed, warned

NOT_ON_A_DEVICE = ("cryptography", "grpcio-health-checking")  # which imports neither; a device's image is without them


def check_packages(extras: Sequence[str], may_lack: Collection[str] = ()) -> Iterator[Finding]:
    """One line for Python and sfl, one for all packages that are as they should be, and one for each that is not.

    `extras` are sfl's own that a daemon of this kind needs, and packages that it `may_lack` need not be installed.
    """
    yield passed("versions", f"sfl {__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    try:
        needed = metadata.requires("sfl") or []
    except metadata.PackageNotFoundError:
        yield warned("packages", "sfl is not installed as a package", "which versions it needs is not known here: pip install it")
        return
    good: list[str] = []
    for requirement in _in_force(needed, extras):
        if requirement.name in may_lack and not _installed(requirement.name):
            continue
        finding = _check(requirement)
        if finding is None:
            good.append(f"{requirement.name} {metadata.version(requirement.name)}")
        else:
            yield finding
    yield passed("packages", ", ".join(sorted(good)))


def _in_force(needed: Iterable[str], extras: Sequence[str]) -> Iterator[Requirement]:
    for text in needed:
        requirement = Requirement(text)
        asked = requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if asked and requirement.name != "sfl":
            yield requirement


def _check(requirement: Requirement) -> Finding | None:
    """What is wrong with a package; None where nothing is."""
    wanted = f"{requirement.name}{requirement.specifier}"
    version = _installed(requirement.name)
    if version is None:
        return failed("packages", f"{requirement.name} is not installed", f"pip install '{wanted}'")
    # A build of torch for one kind of machine, 2.13.0+cpu, is of version 2.13.0.
    if not requirement.specifier.contains(version.partition("+")[0], prereleases=True):
        return failed("packages", f"{requirement.name} is {version}", f"pip install '{wanted}'")
    return None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
