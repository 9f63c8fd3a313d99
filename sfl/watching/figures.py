"""Prometheus figures of a daemon: what its events say, counted, and what is read at the moment when somebody asks.

Labels hold the names of devices and a few fixed words, and a device's figures go when its edge server forgets it, so their
number is bounded. Imported only where figures are asked for: a device without them need not hold the library in memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sfl import __version__
from sfl.telemetry import Listener, peak_rss_mb
from sfl.wire.frames import Traffic

Labelled = Mapping[tuple[str, ...], float]
Read = Callable[[], "float | Labelled | None"]

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_VERSIONS_BEHIND = (0, 1, 2, 4, 8, 16, 32)


class Figures:
    """All figures of one daemon, in a registry of their own."""

    def __init__(self, role: str, name: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # or each counter is two
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # resident memory, open files, processor time
        info = self.gauge("sfl_daemon_info", "1, with the daemon's role, name and version of sfl", ("role", "name", "version"))
        info.labels(role, name, __version__).set(1)
        self.read("sfl_peak_memory_bytes", "highest resident memory since the start", lambda: peak_rss_mb() * 1e6)

    def counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def gauge(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def seconds(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Histogram:
        """A histogram of seconds."""
        return Histogram(name, text, labels, buckets=_SECONDS, registry=self.registry)

    def read(self, name: str, text: str, read: Read, labels: tuple[str, ...] = ()) -> None:
        """A figure that `read` gives when somebody asks: a number, numbers by the values of `labels`, or None for nothing."""
        self.registry.register(_Reading(name, text, read, labels))

    def bytes(self, traffic: Mapping[str, Traffic]) -> None:
        """The bytes of messages with tensors, by direction and peer; `traffic` may grow later."""
        self.registry.register(_Bytes(traffic))


class _Reading(Collector):
    def __init__(self, name: str, text: str, read: Read, labels: tuple[str, ...]) -> None:
        self._name, self._text, self._read, self._labels = name, text, read, labels

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        found = self._read()
        if isinstance(found, Mapping):
            for values, value in found.items():
                family.add_metric(values, value)
        elif found is not None:
            family.add_metric((), found)
        yield family

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Asked when it is registered, before there is anything to read."""
        yield GaugeMetricFamily(self._name, self._text, labels=self._labels)


class _Bytes(Collector):
    def __init__(self, traffic: Mapping[str, Traffic]) -> None:
        self._traffic = traffic

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = self._family()
        for peer, traffic in list(self._traffic.items()):
            family.add_metric(("sent", peer), traffic.sent)
            family.add_metric(("received", peer), traffic.received)
        yield family

    def describe(self) -> Iterator[CounterMetricFamily]:
        yield self._family()

    def _family(self) -> CounterMetricFamily:
        return CounterMetricFamily("sfl_bytes", "bytes of messages with tensors", labels=("direction", "peer"))


def device_figures(figures: Figures, name: str) -> Listener:
    """Who hears a device's events for its `figures`."""
    label = ("device",)
    steps = figures.counter("sfl_device_steps", "optimiser steps", label).labels(name)
    planned = figures.gauge("sfl_device_planned_steps", "steps that the device is to make", label).labels(name)
    at = figures.gauge("sfl_device_step", "number of the last step", label).labels(name)
    examples = figures.counter("sfl_device_examples", "training examples", label).labels(name)
    loss = figures.gauge("sfl_loss", "loss of the last step", label)
    seconds = figures.seconds("sfl_step_seconds", "seconds of a step, the edge server's part included", label).labels(name)
    version = figures.gauge("sfl_version", "global version that the adapter stems from", label)
    adoptions = figures.counter("sfl_adoptions", "global versions taken over", label).labels(name)
    dropped = figures.counter("sfl_dropped_steps", "steps whose progress was dropped at an adoption", label).labels(name)
    submissions = figures.counter("sfl_submissions", "submitted updates, by what triggered them", ("device", "trigger"))
    upload = figures.seconds("sfl_upload_seconds", "seconds of an upload, all tries included", label).labels(name)
    failures = figures.counter("sfl_upload_failures", "tries of an upload that failed", label).labels(name)
    uplink = figures.gauge("sfl_uplink_bytes_per_second", "throughput of uploads, as measured", label)
    evaluation = figures.gauge("sfl_evaluation", "figures of the last evaluation", ("device", "split", "figure"))
    resumes = figures.counter("sfl_resumes", "times that training went on from a checkpoint", label).labels(name)
    moved = figures.counter("sfl_moves", "times that an edge server knew nothing of the session", label).labels(name)

    def hear(event: str, fields: Mapping[str, Any]) -> None:
        if event == "step":
            steps.inc()
            at.set(fields["step"])
            examples.inc(fields["examples"])
            loss.labels(name).set(fields["loss"])
            version.labels(name).set(fields["version"])
            seconds.observe(fields["wall_s"])
        elif event == "start":
            planned.set(fields["steps"])
        elif event == "adopt":
            adoptions.inc()
            dropped.inc(fields.get("dropped_steps", 0))
            version.labels(name).set(fields["version"])
        elif event == "submit":
            submissions.labels(name, fields["trigger"]).inc()
            if "upload_s" in fields:
                upload.observe(fields["upload_s"])
                failures.inc(fields["failures"])
                uplink.labels(name).set(fields["bytes_per_s"])
        elif event == "eval":
            for figure in ("loss", "accuracy", "f1_macro"):
                if figure in fields:
                    evaluation.labels(name, fields["split"], figure).set(fields[figure])
        elif event in ("resume", "move"):
            (resumes if event == "resume" else moved).inc()
            at.set(fields["step"])
            version.labels(name).set(fields["version"])

    return hear


def edge_figures(figures: Figures) -> Listener:
    """Who hears an edge server's events for its `figures`."""
    label = ("device",)
    steps = figures.counter("sfl_edge_steps", "steps computed for a device", label)
    compute = figures.seconds("sfl_edge_compute_seconds", "seconds that the edge's part of a step takes")
    queue = figures.seconds("sfl_edge_queue_seconds", "seconds that a step waits for its turn")
    loss = figures.gauge("sfl_loss", "loss of the last step", label)
    version = figures.gauge("sfl_version", "global version that the edge's half stems from", label)
    submissions = figures.counter("sfl_edge_submissions", "halves of updates taken", label)
    opened = figures.counter("sfl_sessions_opened", "sessions, those that devices came back to included", ("state",))
    provided = figures.counter("sfl_provided_bytes", "bytes of halves of models sent to devices")
    packed = figures.counter("sfl_packed", "halves of models packed")

    def hear(event: str, fields: Mapping[str, Any]) -> None:
        if event == "step":
            device = fields["device"]
            steps.labels(device).inc()
            compute.observe(fields["wall_s"])
            queue.observe(fields["queue_s"])
            loss.labels(device).set(fields["loss"])
            version.labels(device).set(fields["version"])
        elif event == "submit":
            submissions.labels(fields["device"]).inc()
        elif event == "adopt":
            version.labels(fields["device"]).set(fields["version"])
        elif event == "session":
            opened.labels(fields["state"]).inc()
            if fields["state"] == "forgotten":
                for figure in (steps, loss, version, submissions):
                    with contextlib.suppress(KeyError):  # a session without a step
                        figure.remove(fields["device"])
        elif event == "provide":
            provided.inc(fields["bytes"])
        elif event == "pack":
            packed.inc()

    return hear


def fed_figures(figures: Figures) -> Listener:
    """Who hears the federation server's events for its `figures`."""
    label = ("device",)
    versions = figures.counter("sfl_versions", "versions made of updates")
    seconds = figures.seconds("sfl_aggregation_seconds", "seconds that making a version takes")
    aggregated = figures.counter("sfl_aggregated_submissions", "submissions that versions were made of")
    weight = figures.gauge("sfl_weight", "weight of a device in the newest version", label)
    behind = Histogram(
        "sfl_update_lag_versions",
        "versions that an update was behind",
        buckets=_VERSIONS_BEHIND,
        registry=figures.registry,
    )
    uploads = figures.counter("sfl_uploads", "devices' halves of updates", label)
    refused = figures.counter("sfl_refused", "updates that were not used")
    duplicates = figures.counter("sfl_duplicates", "halves of updates that came again")
    expired = figures.counter("sfl_expired", "halves of updates that were given up, as their other half had not come")
    no_quorum = figures.counter("sfl_no_quorum", "pools that waited too long for a quorum")
    epsilon = figures.gauge("sfl_epsilon", "differential privacy that a device has spent", label)

    def hear(event: str, fields: Mapping[str, Any]) -> None:
        if event == "aggregate":
            versions.inc()
            seconds.observe(fields["wall_s"])
            aggregated.inc(fields["submissions"])
            weight.clear()
            for device, share in fields["devices"].items():
                weight.labels(device).set(share)
            for lag in fields["lags"].values():
                behind.observe(lag)
            for device, spent in fields.get("epsilon", {}).items():
                epsilon.labels(device).set(spent)
        elif event == "upload":
            uploads.labels(fields["device"]).inc()
        elif event == "refused":
            refused.inc()
        elif event == "duplicate":
            duplicates.inc()
        elif event == "expired":
            expired.inc()
        elif event == "no_quorum":
            no_quorum.inc()

    return hear
