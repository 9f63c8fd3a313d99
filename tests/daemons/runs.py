"""Whole runs of a small federation, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfl.cluster.plan import Plan
from sfl.data.settings import DataSettings
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings, LoraSettings, StrategySettings
from tests.daemons.processes import Daemons
from tests.flows import write_texts

LORA = LoraSettings(rank=4, alpha=8)


def device_settings(name: str, model: Path, data: Path, **changes: Any) -> DeviceSettings:
    """A device with small batches and one thread."""
    settings: dict[str, Any] = {"batch_size": 4, "max_length": 48, "lora": LORA, "threads": 1, "give_up_s": 60, **changes}
    return DeviceSettings(name=name, model=str(model), data=DataSettings(path=data), **settings)


def edge_settings(name: str, device: DeviceSettings, **changes: Any) -> EdgeSettings:
    """An edge server that fits `device`."""
    shared = {key: getattr(device, key) for key in ("model", "task", "lora", "precision", "threads", "give_up_s")}
    return EdgeSettings(name=name, **{**shared, **changes})


def several_devices(folder: Path, model: Path, cuts: Sequence[int], **changes: Any) -> tuple[DeviceSettings, ...]:
    """`device-1` and so on, one a cut, each with data and a seed of its own."""
    return tuple(
        device_settings(
            f"device-{number}", model, write_texts(folder / f"texts-{number}.txt", 120, number), cut=cut, seed=number, **changes
        )
        for number, cut in enumerate(cuts, 1)
    )


def start_all(
    daemons: Daemons,
    strategy: StrategySettings,
    edges: Sequence[EdgeSettings],
    devices: Sequence[DeviceSettings],
    **fed: Any,
) -> None:
    """Start all daemons at once, at free addresses; device i (from 0) has edge i mod their number. Versions: `adapters/`."""
    settings = FedSettings(devices=len(devices), strategy=strategy, adapters=daemons.folder / "adapters", **fed)
    plan = Plan(daemons.folder, settings, tuple(edges), tuple(devices)).with_addresses()
    daemons.start("fed", plan.fed)
    for edge in plan.edges:
        daemons.start("edge", edge)
    for device in plan.devices:
        daemons.start("device", device)


def stop_servers(daemons: Daemons, edges: Sequence[str] = ("edge",)) -> dict[str, int]:
    """SIGTERM to the edge servers, then to the federation server: their exit codes."""
    return {name: daemons[name].stop() for name in (*edges, "fed")}
