"""What the federation server tells of itself and its members, also over gRPC and on a terminal."""

from __future__ import annotations

import io
import json
import socket
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from sfl.cli.main import app
from sfl.cli.status import as_dict, shown
from sfl.errors import RefusedError, UnknownMemberError, WireError
from sfl.fed_server.coordinator import Federation
from sfl.fed_server.status import StatusBoard
from sfl.telemetry import MetricsWriter
from sfl.v1 import federation_pb2 as pb
from sfl.wire.federation import FederationClient
from tests.fed_server.made import PLACEMENT, Clock, adapter, device, edge, federation, half, started, submit
from tests.fed_server.test_service import clients, join_request, serving, until


def board(folder: Path, names: tuple[str, ...] = ("a", "b"), **changes: Any) -> tuple[Federation, StatusBoard, Clock]:
    """A federation whose members have joined, with version 0, and what is told of it."""
    clock, metrics = Clock(), MetricsWriter(None)
    fed = federation(folder, len(names), clock, metrics, **changes)
    made = StatusBoard(fed, "fed", clock=clock)
    metrics.listen(made.hear)
    for member in (*map(device, names), edge()):
        fed.join(member)
        fed.watch_begins(member.name)
    fed.propose("edge", PLACEMENT, adapter(0))
    return fed, made, clock


def report(name: str, step_s: float = 0.5, wait_s: float = 0.2, **more: Any) -> pb.ReportRequest:
    common: dict[str, Any] = {
        "activity": "training",
        "stepping": True,
        "steps": 7,
        "planned_steps": 40,
        "version": 0,
        "loss": 0.5,
    }
    return pb.ReportRequest(name=name, step_s=step_s, edge_wait_s=wait_s, step_age_s=1.0, **{**common, **more})


def by_name(reply: pb.StatusReply) -> dict[str, pb.MemberStatus]:
    return {member.name: member for member in reply.members}


def test_it_tells_of_every_member(tmp_path: Path) -> None:
    fed, made, clock = board(tmp_path)
    made.report(report("a"))
    made.report(
        pb.ReportRequest(
            name="edge", sessions=[pb.SessionReport(device=name, step=7, compute_s=0.1, queue_s=0.0) for name in ("a", "b")]
        )
    )
    submit(fed, "a", adapter(1))
    clock.now += 12
    reply = made.status()
    assert (reply.name, reply.version, reply.joined, reply.expected) == ("fed", 1, 2, 2)
    assert (reply.aggregations, reply.submissions, reply.refused) == (1, 1, 0)
    assert reply.version_age_s == 12
    assert abs(reply.time - time.time()) < 5
    assert [(member.name, member.role) for member in reply.members] == [("a", pb.DEVICE), ("b", pb.DEVICE), ("edge", pb.EDGE)]
    found = by_name(reply)
    assert (found["a"].edge, found["a"].submissions, found["a"].cut, found["a"].presence) == ("edge", 1, 1, "present")
    assert (found["a"].report.steps, found["a"].report.loss, found["a"].report_age_s) == (7, 0.5, 12)
    assert not found["b"].HasField("report")
    assert found["b"].heard_s == 0, "it watches"


def test_states(tmp_path: Path) -> None:
    clock = Clock()
    fed = federation(tmp_path, 2, clock, strategy={"name": "fedavg"}, away_after_s=60, join_wait_s=5)
    made = StatusBoard(fed, clock=clock)
    assert made.status().state == "waiting for devices: 0 of 2 have joined"
    for name in ("a", "b"):
        fed.join(device(name))
    fed.join(edge())
    assert made.status().state == "waiting for an edge server to propose version 0"
    assert not made.status().HasField("version")
    fed.propose("edge", PLACEMENT, adapter(0))
    assert made.status().state == "training"
    submit(fed, "a", adapter(1))
    assert made.status().state == "training; the pool has updates of a, none yet of b"
    clock.now += 61
    assert made.status().state == "waiting: no device is there"
    found = by_name(made.status())
    assert (found["a"].presence, found["a"].slow) == ("away", "away: not heard of for 61 s")
    for name in ("a", "b"):
        fed.leave(name)
    assert made.status().state == "finished"
    assert by_name(made.status())["b"].presence == "left"


def test_a_version_that_cannot_be_written_is_told_until_it_is(tmp_path: Path) -> None:
    fed = started(tmp_path, [device("a")])
    obstacle = tmp_path / "v1"
    obstacle.mkdir()
    submit(fed, "a", adapter(1))
    assert made_state(fed).startswith("held up: no version can be made of the pool: ")
    assert str(obstacle) in made_state(fed) and "make room" in made_state(fed)
    fed.leave("a")
    assert made_state(fed).startswith("held up: "), "also when it is the last version"
    obstacle.rmdir()
    fed.tick()
    assert (fed.version, made_state(fed)) == (1, "finished")


def test_why_there_is_no_agreement(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2)
    for name in ("a", "b"):
        fed.join(device(name, labels=("benign",)))
    assert made_state(fed).startswith("failed: all devices together have seen only one class")


def made_state(fed: Federation) -> str:
    return StatusBoard(fed).status().state


def test_who_is_slow_is_told_with_the_reason_that_both_sides_reports_give(tmp_path: Path) -> None:
    fed, made, clock = board(tmp_path, ("a", "b", "c"))
    for name, step_s in (("a", 0.5), ("b", 0.5), ("c", 3.0)):
        made.report(report(name, step_s, step_s - 0.3))
    assert by_name(made.status())["c"].slow.startswith("slow link to its edge server, or that is slow: 2.70 of 3.00 s")
    queues = {"a": 0.0, "b": 0.0, "c": 2.5}
    sessions = [pb.SessionReport(device=name, step=7, compute_s=0.1, queue_s=queue) for name, queue in queues.items()]
    made.report(pb.ReportRequest(name="edge", sessions=sessions))
    found = by_name(made.status())
    assert found["c"].slow.startswith("it waits its turn at edge server edge: 2.50 of 3.00 s a step")
    assert not found["a"].slow
    assert made.slow().keys() == {"c"}
    clock.now += 100
    assert made.slow()["a"] == "no step for 101 s: training"
    assert made.ages() == {"a": 101.0, "b": 101.0, "c": 101.0}
    fed.leave("a")
    assert made.ages() == {"b": 101.0, "c": 101.0}


def test_the_link_is_what_came_with_uploads(tmp_path: Path) -> None:
    fed, made, _ = board(tmp_path)
    state = {key: value for key, value in adapter(1).items() if key.layer < 1}
    fed.submit(half("device", "a", bytes_per_s=1e6, round_trip_s=0.01, failures=2), state)
    link = by_name(made.status())["a"].link
    assert (link.bytes_per_s, link.round_trip_s, link.failures) == (1e6, 0.01, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"step_s": float("nan")},
        {"edge_wait_s": -1.0},
        {"every_s": float("nan")},
        {"loss": float("inf")},
        {"activity": "x" * 201},
        {"activity": "\x1b[2J"},
        {"sessions": [pb.SessionReport(device="b", compute_s=float("inf"))]},
        {"sessions": [pb.SessionReport(device="b")] * 10_001},
        {"sessions": [pb.SessionReport(device="b" * 201)]},
    ],
)
def test_figures_that_are_none_are_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    _, made, _ = board(tmp_path)
    request = pb.ReportRequest(name="a", activity="training")
    request.MergeFrom(pb.ReportRequest(**wrong))
    with pytest.raises(WireError):
        made.report(request)
    assert not by_name(made.status())["a"].HasField("report")


def test_strangers_report_nothing_and_devices_no_sessions(tmp_path: Path) -> None:
    _, made, _ = board(tmp_path)
    with pytest.raises(UnknownMemberError):
        made.report(report("stranger"))
    made.report(report("a", sessions=[pb.SessionReport(device="b", compute_s=99.0, queue_s=0.0)]))
    assert by_name(made.status())["b"].edge == ""


def test_an_edge_server_is_not_blamed_by_another_ones_report(tmp_path: Path) -> None:
    fed, made, clock = board(tmp_path)
    fed.join(edge("other"))
    fed.join(device("a", edge="edge"))
    for name, queue_s in (("edge", 0.0), ("other", 99.0)):
        clock.now += 1
        sessions = [pb.SessionReport(device=each, step=7, compute_s=0.1, queue_s=queue_s) for each in ("a", "nobody")]
        made.report(pb.ReportRequest(name=name, sessions=sessions))
    assert by_name(made.status())["a"].edge == "edge"
    fed.join(device("a", edge="other"))  # it has moved
    assert by_name(made.status())["a"].edge == "other"
    assert made._sessions().keys() == {"a"}


def test_a_report_keeps_a_member_present(tmp_path: Path) -> None:
    fed, made, clock = board(tmp_path, away_after_s=60)
    fed.watch_ends("a")
    for _ in range(4):
        clock.now += 40
        made.report(report("a"))
    assert by_name(made.status())["a"].presence == "present"


def test_who_has_stopped_and_who_is_silent_is_told_by_the_server(tmp_path: Path) -> None:
    fed, made, clock = board(tmp_path, away_after_s=60)
    for name in ("a", "b", "edge"):
        made.report(report(name))
    made.report(report("a", activity="over and out", stepping=False, ended=True))
    fed.watch_ends("a")
    fed.watch_ends("edge")
    clock.now += 20
    assert told(made, "a") == ("stopped", "")
    assert told(made, "b") == ("present", "")
    assert told(made, "edge") == ("silent", "silent: not heard of for 20 s")
    assert made.status().state == "training"
    made.report(report("b", activity="stopped by error SFL-700", stepping=False, ended=True))
    assert made.status().state == "waiting: no device is there"
    clock.now += 50
    assert told(made, "a") == ("away", "stopped, and not heard of for 70 s")
    assert told(made, "b") == ("stopped", "")
    assert told(made, "edge") == ("away", "away: not heard of for 70 s")
    made.report(report("a"))
    assert told(made, "a") == ("present", ""), "it is back"


def test_who_is_cut_off_with_its_connection_open_is_silent_once_reports_are_missing(tmp_path: Path) -> None:
    fed, made, clock = board(tmp_path)
    made.report(report("a", every_s=10))
    made.report(report("b"))  # which may never report again
    made.report(report("edge", every_s=0.2))
    clock.now += 9
    assert [told(made, name)[0] for name in ("a", "b", "edge")] == ["present"] * 3
    clock.now += 20
    assert [told(made, name)[0] for name in ("a", "b", "edge")] == ["present", "present", "silent"]
    clock.now += 2
    assert told(made, "a") == ("silent", "silent: not heard of for 31 s")
    assert by_name(made.status())["a"].heard_s == 31
    assert made.slow().keys() >= {"a", "edge"}
    assert Counter(each.state for each in made.presences()) == {"silent": 2, "present": 1}
    fed.watch_ends("a")  # by keepalive, in the end
    assert told(made, "a")[0] == "silent"
    made.report(report("a", every_s=10))
    assert told(made, "a") == ("present", "")


def test_a_pool_that_waits_for_who_is_not_there_says_so(tmp_path: Path) -> None:
    fed, made, _ = board(tmp_path, strategy={"name": "fedavg"})
    for name in ("a", "b"):
        made.report(report(name))
    made.report(report("a", activity="stopped", stepping=False, ended=True))
    submit(fed, "b", adapter(1))
    assert made.status().state == "training; the pool has updates of b, none yet of a (stopped)"


def told(made: StatusBoard, name: str) -> tuple[str, str]:
    """A member's presence, and why it is behind."""
    member = by_name(made.status())[name]
    return member.presence, member.slow


def test_a_terminal_shows_what_the_server_says_of_a_member() -> None:
    for presence, activity, ended, seen in (
        ("present", "training", False, "training"),
        ("present", "", False, "present"),
        ("silent", "training", False, "silent"),
        ("stopped", "stopped by error SFL-700", True, "stopped by error SFL-700"),
        ("away", "stopped by error SFL-700", True, "stopped by error SFL-700"),
        ("away", "training", False, "away"),
        ("left", "done", True, "left"),
    ):
        screen = Console(file=io.StringIO(), width=220)
        report = pb.ReportRequest(name="pi", activity=activity, ended=ended)
        member = pb.MemberStatus(name="pi", role=pb.DEVICE, presence=presence, report=report)
        screen.print(*shown(pb.StatusReply(members=[member])), sep="\n")
        text: str = screen.file.getvalue()  # type: ignore[attr-defined]
        row = next(line for line in text.splitlines() if line.startswith("pi "))
        assert row.removeprefix("pi").strip().startswith(f"{seen}  "), (presence, row)


def test_over_grpc(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    with serving(fed) as (address, _), clients(address, "a") as (a,):
        a.report(report("a"))  # before it has joined: lost, and said to nobody
        a.join(join_request("a"))
        a.report(report("a"))
        until(lambda: by_name(a.status())["a"].report.steps == 7)
        assert a.status().state == "waiting for an edge server to propose version 0"
        a.served_by("edge")
        assert by_name(a.status())["a"].report.steps == 7, "of the process that has opened a session now"
        a.report(report("a", ended=True))
        until(lambda: by_name(a.status())["a"].presence == "stopped")
        a.join(join_request("a"))  # as its next process does, which may report nothing
        assert by_name(a.status())["a"].presence == "present"
    a.report(report("a"))  # the connection is closed: no harm


def test_checking_changes_nothing_and_tells_the_number(tmp_path: Path) -> None:
    fed = federation(tmp_path, 2)
    with serving(fed) as (address, _), clients(address, "a", "b") as (a, b):
        reply = a.check(join_request("a"))
        assert (reply.refusal, reply.error) == ("", 0)
        assert abs(reply.time - time.time()) < 5
        assert fed.joined == 0
        a.join(join_request("a"))
        reply = b.check(join_request("b", model_fingerprint="other"))
        assert reply.error == 602
        assert "has another base model" in reply.refusal
        with pytest.raises(RefusedError) as refused:
            b.join(join_request("b", model_fingerprint="other"))
        assert refused.value.code == "SFL-602", "a refusal has the number of the other side's error"
        assert fed.joined == 1


def full(tmp_path: Path) -> pb.StatusReply:
    fed, made, clock = board(tmp_path, ("a", "[red]b[/red]", "c"), away_after_s=60)
    fed.watch_ends("c")
    clock.now += 61
    for name, step_s in (("a", 0.5), ("[red]b[/red]", 3.0)):
        made.report(report(name, step_s, memory_bytes=123_000_000, peak_memory_bytes=150_000_000))
    made.report(pb.ReportRequest(name="edge", activity="serving 1 device", sessions=[pb.SessionReport(device="a", step=7)]))
    return made.status()


def test_as_a_table(tmp_path: Path) -> None:
    screen = Console(file=io.StringIO(), width=220)
    screen.print(*shown(full(tmp_path)), sep="\n", highlight=False)
    text = screen.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert lines[0].startswith("fed (sfl ")
    row = next(line for line in lines if line.startswith("a "))
    for word in ("training", "edge", "7/40", "0.5000", "0.50", "1 s ago", "123 (at most 150)"):
        assert word in row
    assert any(line.startswith("[red]b[/red] ") and "it computes" not in line for line in lines), "names are not markup"
    assert "[red]b[/red]: it computes slowly itself" in text
    assert "c: away: not heard of for 61 s" in text
    assert any(line.split()[:4] == ["edge", "serving", "1", "device"] for line in lines)


def test_as_json_numbers_are_numbers(tmp_path: Path) -> None:
    found = json.loads(json.dumps(as_dict(full(tmp_path))))
    assert found["version"] == 0
    assert found["version_age_s"] is None
    a = next(member for member in found["members"] if member["name"] == "a")
    assert (a["role"], a["report"]["memory_bytes"], a["report"]["loss"]) == ("DEVICE", 123_000_000, 0.5)
    assert next(member for member in found["members"] if member["name"] == "c")["report"] is None


def test_the_command(tmp_path: Path) -> None:
    fed = federation(tmp_path, 1)
    with serving(fed) as (address, _):
        plain = CliRunner().invoke(app, ["status", "--federation", address], catch_exceptions=False)
        assert "waiting for devices: 0 of 1 have joined" in plain.output
        as_json = CliRunner().invoke(app, ["status", "--federation", address, "--json"], catch_exceptions=False)
        assert json.loads(as_json.output)["expected"] == 1
        client = FederationClient(address, "", 5, 5)
        client.close()


def test_a_port_that_refuses_is_said_at_once_and_one_that_is_silent_is_waited_for() -> None:
    def asked(address: str, *more: str) -> tuple[str, float]:
        began = time.monotonic()
        result = CliRunner().invoke(app, ["status", "--federation", address, *more])
        return str(result.exception), time.monotonic() - began

    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert asked(address, "--wait-s", "0.3")[0].startswith(f"the federation server at {address} did not answer within 0.3 s")
    message, took_s = asked(address)
    assert message == f"nobody listens at {address}: is the federation server running, and is the address right?"
    assert took_s < 1
