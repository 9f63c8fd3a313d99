"""What the user sees on standard error while the daemons work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from sfl.cluster.cluster import Cluster
from sfl.cluster.metrics import Event, Follower

PLAIN_LINE_S = 5.0  # between two lines where standard error is no terminal
_SMOOTHING = 0.8  # weight of the past in the loss that is shown


@dataclass
class DeviceProgress:
    """One device as its metrics show it; `loss` is smoothed, None before the first step."""

    name: str
    cut: str
    steps: int
    state: str = "starting"
    step: int = 0
    version: int = 0
    loss: float | None = None
    bytes_sent: int = 0
    bytes_received: int = 0

    def take(self, event: Event) -> None:
        """Bring this up to date with one event of the device's; events unknown here change nothing."""
        kind = event["event"]
        self.version = int(event.get("version", self.version))
        self.bytes_sent = int(event.get("bytes_sent", self.bytes_sent))
        self.bytes_received = int(event.get("bytes_received", self.bytes_received))
        if kind == "start":
            self.state = "joining"
        elif kind == "resume":
            self.step = int(event["step"])
        elif kind == "step":
            self.step = int(event["step"])
            new = float(event["loss"])
            self.loss = new if self.loss is None else _SMOOTHING * self.loss + (1 - _SMOOTHING) * new
            self.state = "training" if self.step < self.steps else "testing"
        elif kind == "end":
            self.state = "done"


class Progress:
    """Follows a cluster's metrics files: a live table on a terminal, elsewhere a line every few seconds.

    A context manager; call `tick` as often as convenient.
    """

    def __init__(self, cluster: Cluster, console: Console) -> None:
        self.devices = [DeviceProgress(device.name, str(device.cut), device.steps) for device in cluster.devices]
        self.version = 0
        self._devices = [Follower(cluster.metrics(device.name)) for device in cluster.devices]
        self._fed = Follower(cluster.metrics(cluster.fed.name))
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live:
            self._live.stop()

    def tick(self) -> None:
        """Read what is new, and show it."""
        for device, follower in zip(self.devices, self._devices, strict=True):
            for event in follower.new():
                device.take(event)
        for event in self._fed.new():
            self.version = int(event.get("version", self.version)) if event["event"] == "aggregate" else self.version
        if self._live:
            self._live.update(self._table(), refresh=True)
        elif time.monotonic() - self._last_line >= PLAIN_LINE_S:
            self._last_line = time.monotonic()
            self._console.print(self._line(), soft_wrap=True, highlight=False, markup=False)

    def _line(self) -> str:
        devices = ", ".join(
            f"{device.name} {device.step}/{device.steps} loss {_number(device.loss)}"
            if device.step
            else f"{device.name} {device.state}"
            for device in self.devices
        )
        moved = sum(device.bytes_sent + device.bytes_received for device in self.devices)
        return f"{time.monotonic() - self._started:4.0f} s  version {self.version}  {megabytes(moved)}  {devices}"

    def _table(self) -> Table:
        elapsed = time.monotonic() - self._started
        table = Table(
            title=f"global version {self.version}, {elapsed:.0f} s", title_justify="left", box=None, padding=(0, 2, 0, 0)
        )
        for name in ("device", "cut", "", "step", "loss", "version", "sent", "received", "state"):
            table.add_column(name, justify="left" if name in ("device", "", "state") else "right")
        for device in self.devices:
            table.add_row(
                device.name,
                device.cut,
                ProgressBar(total=device.steps, completed=device.step, width=20),
                f"{device.step}/{device.steps}",
                _number(device.loss),
                str(device.version),
                megabytes(device.bytes_sent),
                megabytes(device.bytes_received),
                device.state,
            )
        return table


def megabytes(count: int) -> str:
    """Bytes as text in MB (10**6 bytes)."""
    return f"{count / 1e6:.1f} MB"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
