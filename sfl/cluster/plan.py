"""Which daemons a local run consists of: one settings model each."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfl.data.settings import DataSettings
from sfl.errors import SettingsError
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings


@dataclass(frozen=True)
class Plan:
    """The settings of every daemon of one federation on this machine, with the folder `out` that all their files go to.

    The names must differ, and be fit for folder names. Addresses are filled in by the cluster, whatever they are here; device i
    (from 0) talks to edge i mod the number of edges.
    """

    out: Path
    fed: FedSettings
    edges: tuple[EdgeSettings, ...]
    devices: tuple[DeviceSettings, ...]

    def __post_init__(self) -> None:
        names = [daemon.name for daemon in (self.fed, *self.edges, *self.devices)]
        if not self.edges or not self.devices or len(set(names)) != len(names):
            raise SettingsError(f"a cluster needs an edge, a device and different names, not {', '.join(names)}")

    def with_addresses(self) -> Plan:
        """The same plan with free ports of this machine."""
        fed, *edges = free_addresses(1 + len(self.edges))
        return Plan(
            self.out,
            self.fed.model_copy(update={"listen": fed}),
            tuple(
                edge.model_copy(update={"listen": own, "federation": fed}) for edge, own in zip(self.edges, edges, strict=True)
            ),
            tuple(
                device.model_copy(update={"edge": edges[index % len(edges)], "federation": fed})
                for index, device in enumerate(self.devices)
            ),
        )


def free_addresses(count: int) -> list[str]:
    """`count` different loopback addresses that nobody listens on at this moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
    finally:
        for each in sockets:
            each.close()


def share_data(
    paths: Sequence[Path], devices: int | None, seed: int, text_columns: tuple[str, ...] = ("text",)
) -> list[DataSettings]:
    """Each device's data: one path each, or, where there are more devices than paths, paths divided evenly in turn.

    `devices` is None for as many as there are paths. Raises `SettingsError` for fewer devices than paths.
    """
    count = len(paths) if devices is None else devices
    if count < len(paths):
        raise SettingsError(
            f"{count} devices for {len(paths)} data files: raise --devices, or leave it out for one device a file"
        )
    shares = [len(range(index, count, len(paths))) for index in range(len(paths))]
    return [
        DataSettings(
            path=paths[index % len(paths)],
            text_columns=text_columns,
            part_index=index // len(paths),
            part_count=shares[index % len(paths)],
            partition_seed=seed,
        )
        for index in range(count)
    ]


def share_threads(devices: int, edges: int, cores: int | None = None) -> tuple[int, int]:
    """CPU threads of each device and of each edge, at least 1: half of the cores for either side.

    The edges do the deeper blocks for all devices, one step at a time each, while devices mostly wait for them.
    `cores` is None for those that this process may use.
    """
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // (2 * devices)), max(1, cores // (2 * edges))
