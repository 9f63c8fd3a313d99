"""One daemon, watched: its metrics file, its vitals, and where settings ask for it an address with figures and health."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from sfl.errors import as_ours
from sfl.settings import DaemonSettings, DeviceSettings, EdgeSettings
from sfl.telemetry import Listener, MetricsWriter, log
from sfl.v1.federation_pb2 import ReportRequest
from sfl.watching.vitals import DONE, DeviceVitals, EdgeVitals, Process, Vitals, WaitClock
from sfl.wire.address import is_loopback
from sfl.wire.frames import Traffic

if TYPE_CHECKING:
    from sfl.watching.endpoint import Endpoint, Page
    from sfl.watching.figures import Figures, Read


LAST_S = 2.0  # that a last report may take of a daemon's time to stop


class Reports(Protocol):
    """Who takes reports: the federation server's client."""

    def report(self, request: ReportRequest) -> None:
        """Send one, once."""


class Watch:
    """What a daemon shows of itself, from its first moment to its last; a context manager.

    `metrics` is where its events go. Raises `ListenError` where `metrics_listen` cannot be bound.
    """

    def __init__(self, settings: DaemonSettings) -> None:
        self._settings = settings
        self._ready = False
        self._ended = threading.Event()
        self._reporter: threading.Thread | None = None
        self._last_word = ""
        self.process = Process()
        self._waits = WaitClock()
        self.vitals = _vitals(settings, self.process, self._waits)
        self.figures: Figures | None = None
        self._endpoint: Endpoint | None = None
        listeners: list[Listener] = [self.vitals.hear] if self.vitals is not None else []
        if settings.metrics_listen:
            listeners.append(self._show())
        self.metrics = MetricsWriter(settings.out / "metrics.jsonl", *listeners)
        self._waits.__enter__()

    def ready(self) -> None:
        """The daemon does what it is there for from now on: it is healthy."""
        self._ready = True

    def says(self, activity: str) -> None:
        """What an edge server does while no device has a session with it."""
        if isinstance(self.vitals, EdgeVitals):
            self.vitals.activity = activity

    def goes_on(self, sent: int, received: int) -> None:
        """A device's run has moved so many bytes before this process."""
        if isinstance(self.vitals, DeviceVitals):
            self.vitals.goes_on(sent, received)

    def traffic(self, peer: str, traffic: Traffic) -> None:
        """Count `traffic` as that with `peer`."""
        self.process.traffic[peer] = traffic

    def read(self, name: str, text: str, read: Read, labels: tuple[str, ...] = ()) -> None:
        """Show a figure that `read` gives when somebody asks; see `Figures.read`."""
        if self.figures is not None:
            self.figures.read(name, text, read, labels)

    def refusals(self, count: Callable[[], int]) -> None:
        """Show how many calls the guard before a server's services has ended."""
        text = "calls that were ended for a lack of rights, a certificate that is not good any more, or a limit"
        self.read("sfl_refused_calls", text, lambda: float(count()))

    def report_to(self, federation: Reports, every_s: float) -> None:
        """Report to `federation` every `every_s` seconds, in a thread of its own, until the end; never for 0."""
        if every_s and self.vitals is not None:
            arguments = (federation, self.vitals, every_s)
            self._reporter = threading.Thread(target=self._report, args=arguments, name="report", daemon=True)
            self._reporter.start()

    def last_report(self, error: BaseException | None = None) -> None:
        """Have whoever is reported to know that this daemon stops now, by this error if it is one and no signal, before its
        connection is closed; returns after `LAST_S` at the latest."""
        self._last_word = _last_word(error)
        self._ended.set()
        if self._reporter is not None:
            self._reporter.join(LAST_S)

    def _report(self, federation: Reports, vitals: Vitals, every_s: float) -> None:
        while not self._ended.is_set():
            report = vitals.report()
            report.every_s = every_s
            federation.report(report)
            self._ended.wait(every_s)
        if self._last_word:
            last = vitals.report()
            last.ended = True
            last.activity = DONE if last.activity == DONE else self._last_word
            last.stepping = False
            del last.sessions[:]
            federation.report(last)

    def close(self) -> None:
        self._ended.set()
        self._waits.__exit__(None, None, None)
        if self._endpoint is not None:
            self._endpoint.close()
        self.metrics.close()

    def _show(self) -> Listener:
        """Open the address; whoever hears events for its figures."""
        # Where no address is asked for, neither an HTTP server nor the library takes memory.
        from sfl.watching.endpoint import Endpoint
        from sfl.watching.figures import Figures, device_figures, edge_figures, fed_figures

        settings, vitals = self._settings, self.vitals
        role = {DeviceVitals: "device", EdgeVitals: "edge"}.get(type(vitals), "fed")
        figures = self.figures = Figures(role, settings.name)
        figures.bytes(self.process.traffic)
        hear: Listener
        if isinstance(vitals, DeviceVitals):
            device = vitals
            hear = device_figures(figures, settings.name)
            ages = _by_device(lambda: {} if device.step_age_s is None else {settings.name: device.step_age_s})
        elif isinstance(vitals, EdgeVitals):
            edge = vitals
            hear = edge_figures(figures)
            ages = _by_device(edge.ages)
            figures.read("sfl_sessions", "devices that have a session here", lambda: float(edge.sessions))
        else:
            hear, ages = fed_figures(figures), None
        if ages is not None:
            figures.read("sfl_last_step_age_seconds", "seconds since a device's last step", ages, ("device",))
        self._endpoint = Endpoint(settings.metrics_listen, {"/metrics": self._metrics_page, "/healthz": self._health_page})
        log.info("figures are at http://%s/metrics", self._endpoint.address)
        if not is_loopback(settings.metrics_listen):
            log.warning(
                "anyone who reaches %s can read names, losses and sizes there; no data, activations or adapters",
                self._endpoint.address,
            )
        return hear

    @property
    def address(self) -> str | None:
        """Where figures and health are, with the port that was bound; None if nowhere."""
        return self._endpoint.address if self._endpoint is not None else None

    def _metrics_page(self, accept: str) -> Page:
        from prometheus_client.exposition import choose_encoder

        from sfl.watching.endpoint import Page

        if self.figures is None:
            return Page(404, "text/plain", b"there are no figures\n")
        encode, kind = choose_encoder(accept)
        return Page(200, kind, encode(self.figures.registry))

    def _health_page(self, accept: str) -> Page:
        from sfl.watching.endpoint import json_page

        content: dict[str, Any] = {"name": self._settings.name, "ready": self._ready}
        if self.vitals is not None:
            report = self.vitals.report()
            content |= {"activity": report.activity, "steps": report.steps}
            if report.HasField("step_age_s"):
                content["step_age_s"] = round(report.step_age_s, 3)
        return json_page(200 if self._ready else 503, content)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _vitals(settings: DaemonSettings, process: Process, waits: WaitClock) -> Vitals | None:
    if isinstance(settings, DeviceSettings):
        return DeviceVitals(settings.name, process, waits)
    return EdgeVitals(settings.name, process) if isinstance(settings, EdgeSettings) else None


def _last_word(error: BaseException | None) -> str:
    if not isinstance(error, Exception):
        return "stopped"
    ours = as_ours(error)
    return "stopped by an error" if ours is None else f"stopped by error {ours.code}"


def _by_device(read: Callable[[], dict[str, float]]) -> Read:
    return lambda: {(device,): value for device, value in read().items()}
