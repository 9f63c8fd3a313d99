"""A daemon, watched: its file, its address, its reports."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sfl.errors import ListenError, UnreachableError
from sfl.phases import phase
from sfl.settings import DeviceSettings, EdgeSettings, FedSettings
from sfl.telemetry import log
from sfl.v1.federation_pb2 import ReportRequest
from sfl.watching import endpoint
from sfl.watching.endpoint import Endpoint, Page
from sfl.watching.watch import Watch
from sfl.wire.frames import Traffic
from tests.metrics import events


def device(folder: Path, listen: str = "127.0.0.1:0", **changes: Any) -> DeviceSettings:
    data = {"path": str(folder / "none")}
    return DeviceSettings.model_validate(
        {"name": "pi-1", "out": str(folder / "out"), "metrics_listen": listen, "data": data, **changes}
    )


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Watch]:
    with Watch(device(tmp_path)) as made:
        yield made


def get(address: str | None, path: str) -> tuple[int, str, str]:
    """Status, kind and text of a page."""
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=5) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


STEP = {"step": 1, "version": 0, "loss": 0.5, "examples": 8, "wall_s": 0.25, "bytes_sent": 1, "bytes_received": 1}


def test_one_event_reaches_the_file_the_figures_and_the_health(watch: Watch, tmp_path: Path) -> None:
    watch.metrics.write("start", name="pi-1", steps=3)
    watch.metrics.write("step", **STEP)
    watch.traffic("edge", traffic := Traffic())
    traffic.add(sent=77)
    assert [event["event"] for event in events(tmp_path / "out")] == ["start", "step"]
    status, kind, text = get(watch.address, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    for line in (
        'sfl_device_steps_total{device="pi-1"} 1.0',
        'sfl_bytes_total{direction="sent",peer="edge"} 77.0',
        "sfl_last_step_age_seconds",
    ):
        assert line in text
    report = json.loads(get(watch.address, "/healthz")[2])
    assert (report["name"], report["steps"]) == ("pi-1", 1)
    assert report["step_age_s"] < 5


def test_it_is_healthy_once_it_is_ready(watch: Watch) -> None:
    with phase("join"):
        status, kind, text = get(watch.address, "/healthz")
    assert (status, kind) == (503, "application/json")
    assert json.loads(text) == {"name": "pi-1", "ready": False, "activity": "waiting for all devices to join", "steps": 0}
    watch.ready()
    assert get(watch.address, "/healthz")[0] == 200


def test_an_edge_server_that_serves_nobody_says_what_it_does_instead(tmp_path: Path) -> None:
    settings = EdgeSettings(name="edge-1", model="none", out=tmp_path / "out", metrics_listen="127.0.0.1:0")
    with Watch(settings) as watch:
        watch.says("serving no device")
        assert json.loads(get(watch.address, "/healthz")[2])["activity"] == "serving no device"
        watch.metrics.write("session", device="pi-1", state="open", step=0)
        assert json.loads(get(watch.address, "/healthz")[2])["activity"] == "serving 1 device"


def test_there_is_nothing_else(watch: Watch) -> None:
    assert get(watch.address, "/")[0] == 404
    assert get(watch.address, "/../../etc/passwd")[0] == 404
    assert get(watch.address, "/metrics?name=x")[0] == 200


@pytest.mark.parametrize("kind", [EdgeSettings, FedSettings])
def test_servers_are_healthy_by_the_same_page(tmp_path: Path, kind: Any) -> None:
    given = {"out": str(tmp_path), "metrics_listen": "127.0.0.1:0"} | ({"devices": 1} if kind is FedSettings else {"model": "m"})
    with Watch(kind.model_validate(given)) as watch:
        watch.ready()
        assert get(watch.address, "/healthz")[0] == 200
        assert "sfl_daemon_info" in get(watch.address, "/metrics")[2]


def test_without_an_address_there_is_no_server_and_no_library(tmp_path: Path) -> None:
    before = threading.active_count()
    with Watch(device(tmp_path, "")) as watch:
        watch.metrics.write("step", **STEP)
        assert watch.address is None
        assert watch.figures is None
        assert threading.active_count() == before
        watch.read("sfl_version", "version", lambda: 1.0)


def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ListenError, match=rf"cannot listen on {address}: Address already in use; .*metrics_listen"):
            Watch(device(tmp_path, address))


def test_who_shows_figures_to_others_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(log, "propagate", True)
    for address, told in (("127.0.0.1:0", False), ("0.0.0.0:0", True)):
        with caplog.at_level(logging.WARNING), Watch(device(tmp_path, address)):
            assert ("anyone who reaches 0.0.0.0" in caplog.text) is told


class Federation:
    def __init__(self) -> None:
        self.reports: list[ReportRequest] = []
        self.came = threading.Event()

    def report(self, request: ReportRequest) -> None:
        self.reports.append(request)
        if len(self.reports) == 3:
            self.came.set()


def test_it_reports_again_and_again_until_it_ends(tmp_path: Path) -> None:
    federation = Federation()
    with Watch(device(tmp_path, "")) as watch:
        watch.report_to(federation, 0.01)
        watch.metrics.write("start", steps=9)
        watch.metrics.write("step", **STEP)
        assert federation.came.wait(5)
    count = len(federation.reports)
    time.sleep(0.1)
    assert len(federation.reports) <= count + 1, "one may have been on its way"
    assert federation.reports[-1].steps == 1
    assert federation.reports[-1].name == "pi-1"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, "stopped"),
        (KeyboardInterrupt(), "stopped"),
        (UnreachableError("x"), "stopped by error SFL-700"),
        (OSError(28, "No space left on device"), "stopped by error SFL-002"),
        (ModuleNotFoundError("no torch", name="torch"), "stopped by error SFL-003"),
        (ModuleNotFoundError("nobody has heard of it", name="x"), "stopped by an error"),
        (RuntimeError("boom"), "stopped by an error"),
    ],
)
def test_the_last_report_says_that_it_stops(tmp_path: Path, error: BaseException | None, told: str) -> None:
    federation = Federation()
    with Watch(device(tmp_path, "")) as watch:
        watch.report_to(federation, 60)
        watch.metrics.write("start", steps=9)
        watch.metrics.write("step", **STEP)
        watch.last_report(error)
        last = federation.reports[-1]
        assert (last.activity, last.steps, last.stepping, last.ended) == (told, 1, False, True)
        assert (federation.reports[0].every_s, federation.reports[0].ended) == (60, False)
    assert len(federation.reports) == 2


def test_the_last_report_of_a_device_that_is_done_says_so(tmp_path: Path) -> None:
    federation = Federation()
    with Watch(device(tmp_path, "")) as watch:
        watch.report_to(federation, 60)
        watch.metrics.write("end", steps=9, bytes_sent=0, bytes_received=0)
        watch.last_report()
    assert federation.reports[-1].activity == "done"


def test_a_last_report_that_does_not_arrive_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfl.watching.watch.LAST_S", 0.1)
    over = threading.Event()
    federation = Federation()
    monkeypatch.setattr(federation, "report", lambda request: over.wait(10))
    with Watch(device(tmp_path, "")) as watch:
        watch.report_to(federation, 60)
        began = time.monotonic()
        watch.last_report()
        assert time.monotonic() - began < 2
    over.set()


def test_a_stopped_edge_server_reports_no_sessions(tmp_path: Path) -> None:
    federation = Federation()
    with Watch(EdgeSettings(name="edge-1", model="none", out=tmp_path / "out")) as watch:
        watch.metrics.write("session", device="pi-1", state="open", step=0)
        watch.report_to(federation, 60)
        watch.last_report()
    last = federation.reports[-1]
    assert (last.activity, len(federation.reports[0].sessions), len(last.sessions)) == ("stopped", 1, 0)


def test_no_reports_where_none_are_asked_for(tmp_path: Path) -> None:
    federation = Federation()
    with Watch(device(tmp_path, "")) as watch:
        watch.report_to(federation, 0)
        time.sleep(0.05)
    assert not federation.reports


def test_callers_that_never_come_to_an_end_take_the_others_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_CONNECTIONS", 3)
    monkeypatch.setattr(endpoint, "_CALLER_S", 0.5)
    page = Page(200, "text/plain", b"here\n")
    server = Endpoint("127.0.0.1:0", {"/": lambda accept: page})
    try:
        port = int(server.address.rpartition(":")[2])
        trickling = [socket.create_connection(("127.0.0.1", port)) for _ in range(3)]
        ended = time.monotonic() + 0.8
        while time.monotonic() < ended:  # never silent, and never done
            for each in trickling:
                with contextlib.suppress(OSError):
                    each.sendall(b"G")
            time.sleep(0.05)
        assert get(server.address, "/") == (200, "text/plain", "here\n")
        for each in trickling:
            each.close()
    finally:
        server.close()


def test_callers_that_say_nothing_take_the_others_nothing(monkeypatch: Any) -> None:
    monkeypatch.setattr(endpoint, "_CONNECTIONS", 3)
    monkeypatch.setattr(endpoint._Handler, "timeout", 1.0)
    page = Page(200, "text/plain", b"here\n")
    server = Endpoint("127.0.0.1:0", {"/": lambda accept: page})
    try:
        port = int(server.address.rpartition(":")[2])
        silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
        time.sleep(1.5)  # after a second of silence they are hung up on
        assert get(server.address, "/") == (200, "text/plain", "here\n")
        for each in silent:
            each.settimeout(5)
            assert each.recv(1) == b"", "hung up on"
            each.close()
    finally:
        server.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=2)
