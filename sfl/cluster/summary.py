"""What a finished run comes to, from the daemons' own reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sfl.cluster.cluster import Cluster
from sfl.cluster.metrics import last, read_events
from sfl.errors import SflError
from sfl.fed_server.versions import version_numbers

Summary = dict[str, Any]


def summarise(cluster: Cluster) -> Summary:
    """`strategy`, `model`, `task`, `devices`, `edges` and `fed` of `OUT/summary.json`: counts, bytes, and MB (10**6 bytes).

    A device's `accuracy`, `f1_macro` and `loss` are those of its last evaluation on its test split; the first two are None for
    a causal LM, and all three where it has no test split. Raises `SflError` when a daemon's report lacks its end.
    """
    first = cluster.devices[0]
    return {
        "strategy": cluster.fed.strategy.name,
        "model": first.model,
        "task": first.task,
        "devices": [
            {
                "name": device.name,
                "cut": device.cut,
                **_end(cluster, device.name, "steps", "examples", "submissions", "bytes_sent", "bytes_received", "peak_rss_mb"),
                **_test(cluster.metrics(device.name)),
            }
            for device in cluster.devices
        ],
        "edges": [
            {"name": edge.name, **_end(cluster, edge.name, "steps", "bytes_received", "bytes_sent", "peak_rss_mb")}
            for edge in cluster.edges
        ],
        "fed": _end(
            cluster, cluster.fed.name, "version", "aggregations", "submissions", "bytes_received", "bytes_sent", "peak_rss_mb"
        ),
    }


def newest_adapter(adapters: Path) -> Path:
    """The folder of the highest version. Raises `SflError` if there is none."""
    numbers = version_numbers(adapters)
    if not numbers:
        raise SflError(f"{adapters} holds no version of the adapter: the federation server published none; see its log")
    return adapters / f"v{max(numbers)}"


def _end(cluster: Cluster, name: str, *fields: str) -> dict[str, Any]:
    path = cluster.metrics(name)
    event = last(read_events(path), "end", path)
    missing = [field for field in fields if field not in event]
    if missing:
        raise SflError(f"{path}: the event 'end' lacks {', '.join(missing)}")
    return {field: event[field] for field in fields}


def _test(path: Path) -> dict[str, float | None]:
    tests = [event for event in read_events(path) if event["event"] == "eval" and event.get("split") == "test"]
    figures = tests[-1] if tests else {}
    return {name: figures.get(name) for name in ("accuracy", "f1_macro", "loss")}
