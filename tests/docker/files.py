"""The files in docker/, as their readers see them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DASHBOARD = DOCKER / "watching" / "grafana" / "dashboards" / "sfl.json"
ROLES = ("fed", "edge", "device")

_FIGURE = re.compile(r"\b(?:sfl|process)_[a-z_]+\b")
# A counter or histogram is one figure in /metrics and several names in a query.
_SUFFIX = re.compile(r"_(sum|count|bucket)$")


def compose(name: str = "compose.yml") -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))
    return content


def services(name: str = "compose.yml") -> dict[str, dict[str, Any]]:
    return dict(compose(name)["services"])


def daemons() -> dict[str, tuple[str, dict[str, Any]]]:
    """Role and definition of each daemon's service."""
    found = {name: (name.partition("-")[0], service) for name, service in services().items()}
    return {name: each for name, each in found.items() if each[0] in ROLES}


def environment(service: dict[str, Any]) -> dict[str, str]:
    """Variables of a service, those of compose itself (`${NAME:-default}`) at their defaults."""
    return {name: re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", str(value)) for name, value in service.get("environment", {}).items()}


def sources(service: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What a service mounts, and where."""
    for volume in service.get("volumes", ()):
        if isinstance(volume, str):
            source, target, *_ = volume.split(":")
            yield source, target
        else:
            yield volume["source"], volume["target"]


def ignored(path: str, patterns: Iterable[str]) -> bool:
    """Whether Docker keeps `path` from the builder: the last pattern counts that it, or a folder that it is in, goes with."""
    folders = [str(each) for each in (PurePosixPath(path), *PurePosixPath(path).parents) if str(each) != "."]
    out = False
    for line in patterns:
        pattern = line.strip()
        if pattern and not pattern.startswith("#"):
            wanted = pattern.removeprefix("!")
            if any(_fits(folder, wanted) for folder in folders):
                out = not pattern.startswith("!")
    return out


def _fits(path: str, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return any(fnmatch(part, pattern[3:]) for part in PurePosixPath(path).parts)
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch, parts, wanted))


def queries() -> dict[str, str]:
    """All that Grafana and Prometheus' rules ask for, by where it stands."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    rules = yaml.safe_load((DOCKER / "watching" / "rules.yml").read_text(encoding="utf-8"))
    found = {panel["title"]: " ; ".join(each["expr"] for each in panel.get("targets", ())) for panel in dashboard["panels"]}
    found |= {each["name"]: each["query"]["query"] for each in dashboard["templating"]["list"]}
    found |= {each["name"]: each["expr"] for each in dashboard["annotations"]["list"]}
    return found | {rule["alert"]: rule["expr"] for group in rules["groups"] for rule in group["rules"]}


def asked_for() -> set[str]:
    """Names of all figures in the queries, as /metrics has them behind `# TYPE`."""
    return {_SUFFIX.sub("", name) for query in queries().values() for name in _FIGURE.findall(query)}


def shown(pages: Iterable[str]) -> set[str]:
    """Names of all figures that these pages of /metrics show."""
    return {line.split()[2] for page in pages for line in page.splitlines() if line.startswith("# TYPE ")}
