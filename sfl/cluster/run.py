"""A plan from its start to its figures."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

from rich.console import Console

from sfl import __version__
from sfl.cluster.cluster import Cluster
from sfl.cluster.metrics import read_events
from sfl.cluster.plan import Plan
from sfl.cluster.progress import Progress
from sfl.cluster.summary import Summary, newest_adapter, summarise
from sfl.data.example import Example
from sfl.data.load import load_splits


def run_plan(plan: Plan, console: Console, title: str = "") -> Summary:
    """Run all daemons, evaluate the newest central adapter, write `summary.json` and `loss.png` into `plan.out`.

    Progress goes to `console`. The central adapter is evaluated on the test examples of all devices together; its figures
    are None where there are no such examples. Returns what `summary.json` holds. Raises `DataError` before anything is
    started, `ChildError` when a daemon fails, `KeyboardInterrupt`.
    """
    started = time.monotonic()
    _require_packages()
    test = _pooled_test(plan)
    cluster = Cluster(plan)
    with Progress(cluster, console) as progress:
        cluster.run(progress.tick)
    summary = summarise(cluster)
    adapter = newest_adapter(cluster.adapters)
    console.print(f"evaluating {adapter.name} on the {len(test)} test examples of all devices", highlight=False)
    from sfl.evaluate import evaluate  # torch, only now: the daemons need the memory and the cores

    nothing = {"loss": None, "count": 0, "accuracy": None, "f1_macro": None, "classes": None}
    central = evaluate(cluster.edges[0].model, adapter, test).as_dict() if test else nothing
    summary = {
        "sfl": __version__,
        **summary,
        "seed": cluster.devices[0].seed,
        "adapter": str(plan.out / "adapters" / adapter.name),
        "wall_s": round(time.monotonic() - started, 2),
        "central": central,
    }
    (plan.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _draw(plan.out / "loss.png", cluster, title)
    return summary


def _require_packages() -> None:
    """Find out now, not when all is trained, that something is not installed; `sfl` says how to install it."""
    for package in ("torch", "transformers", "peft", "matplotlib"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)


def _pooled_test(plan: Plan) -> list[Example]:
    return [example for device in plan.devices for example in load_splits(device.data, device.task).test]


def _draw(path: Path, cluster: Cluster, title: str) -> None:
    from sfl.cluster.report import Curve, draw_losses

    curves = [Curve.from_events(device.name, read_events(cluster.metrics(device.name))) for device in cluster.devices]
    draw_losses(path, curves, title)
