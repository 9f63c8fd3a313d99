"""What an edge server keeps of its sessions on disk, and what it says to devices that come back for them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfl.adapters.state import AdapterState, edge_half
from sfl.device.edge_link import GrpcEdgeLink
from sfl.device.trainer import WentBack
from sfl.edge_server import service, session_files
from sfl.edge_server.uploads import TakenHalf
from sfl.errors import RefusedError, SessionLostError, StateWriteError, UnreachableError
from sfl.telemetry import MetricsWriter
from sfl.wire.split import SessionRequest, TrainingRules
from tests.edge_server.made import Halves, RecordingFederation, ServedEdge, eventually, served
from tests.fed_server.made import no_more_files
from tests.metrics import events

STEPS = 8


@pytest.fixture
def edge(tmp_path: Path) -> Iterator[ServedEdge]:
    with (
        MetricsWriter(tmp_path / "metrics.jsonl") as metrics,
        served(Halves(dropout=0.5), folder=tmp_path / "sessions", metrics=metrics) as made,
    ):
        yield made


class Link(GrpcEdgeLink):
    """A device's link; `numbers` are those of the checkpoints that the device has, each written before the edge is asked."""

    def __init__(self, address: str, request: SessionRequest, numbers: tuple[int, ...], give_up_s: float) -> None:
        self.numbers = list(numbers)
        super().__init__(address, request, 5, give_up_s, held=lambda: tuple(self.numbers))

    def _ask(self, message: Any, tensors: Any = ()) -> Any:
        kind = None if message is None else message.WhichOneof("body")
        number = getattr(getattr(message, kind), "checkpoint", 0) if kind else 0
        if number and number not in self.numbers:
            self.numbers = [*self.numbers[-1:], number]
        return super()._ask(message, tensors)


@contextlib.contextmanager
def linked(
    edge: ServedEdge, *held: int, session: str | None = None, request: SessionRequest | None = None, give_up_s: float = 5
) -> Iterator[Link]:
    """A device's link with the checkpoints `held`; with `session` it has lost its memory, and has still to resume."""
    link = Link(edge.address, request or edge.halves.request(), held, give_up_s)
    try:
        if session is None:
            link.begin(checkpoint=held[-1] if held else 0)
        yield link
    finally:
        link.hang_up()


def step(edge: ServedEdge, link: Link, number: int, checkpoint: int = 0, version: int = 0) -> float:
    return link.step(number, version, edge.halves.batch(number), checkpoint=checkpoint).loss


def undisturbed(edge: ServedEdge) -> list[float]:
    halves = Halves(dropout=0.5)
    session = halves.engine.open(edge.halves.request(), halves.initial)
    return [halves.engine.step(session, number, 0, halves.batch(number)).loss for number in range(1, STEPS + 1)]


def restart(edge: ServedEdge) -> None:
    """Another process of the edge server: it has the files, and nothing else."""
    edge.stop()
    edge.halves = Halves(dropout=0.5)
    edge.fresh_service(edge.halves)
    edge.start()
    edge.run(_send_kept(edge))


def replace_federation(edge: ServedEdge) -> RecordingFederation:
    """Another federation server for the next process of the edge; halves that wait for this one are lost with this process."""
    old = edge.federation
    old.failure = UnreachableError("this process is dead")
    old.open.set()
    eventually(lambda: not edge.service._uploads._running)
    edge.federation = RecordingFederation(edge.halves.initial)
    return edge.federation


async def _send_kept(edge: ServedEdge) -> None:
    edge.service.send_kept()


def values(edge: ServedEdge) -> AdapterState:
    session = edge.halves.engine.resume(edge.halves.request())
    assert session is not None
    return session.adapter.values()


def test_a_device_goes_back_with_an_edge_that_was_restarted(edge: ServedEdge, tmp_path: Path) -> None:
    expected = undisturbed(edge)
    with linked(edge, 1) as link:
        found = [step(edge, link, number, checkpoint=2 if number == 4 else 0) for number in range(1, 7)]
        restart(edge)
        with pytest.raises(WentBack) as back:
            step(edge, link, 7)
        assert back.value.checkpoint == 2  # before step 4
        found[3:] = [step(edge, link, number) for number in range(4, STEPS + 1)]
        link.close()
    assert found == expected
    assert [(event["step"], event["checkpoint"]) for event in events(tmp_path, "resume")] == [(3, 2)]


def test_an_edge_goes_back_with_a_device_that_was_restarted(edge: ServedEdge) -> None:
    expected = undisturbed(edge)
    with linked(edge, 1) as link:
        found = [step(edge, link, number, checkpoint=2 if number == 4 else 0) for number in range(1, 7)]
    with linked(edge, 2, 3, session="device-1-1") as link:
        assert link.resume("device-1-1") == 2
        found[3:] = [step(edge, link, number, checkpoint=3 if number == 6 else 0) for number in range(4, STEPS + 1)]
    assert found == expected


def test_both_restarted_and_the_answer_lost(edge: ServedEdge) -> None:
    expected = undisturbed(edge)
    with linked(edge, 1) as link:
        found = [step(edge, link, number, checkpoint=number) for number in range(1, 6)]
    restart(edge)
    for _ in range(2):  # the first one is gone before it has done anything
        with linked(edge, 5, 6, session="device-1-1") as link:
            assert link.resume("device-1-1") == 5
    with linked(edge, 5, 6, session="device-1-1") as link:
        link.resume("device-1-1")
        found[4:] = [step(edge, link, number) for number in range(5, STEPS + 1)]
    assert found == expected


def test_a_live_device_is_told_to_go_back_until_it_has_heard_it(edge: ServedEdge) -> None:
    with linked(edge, 1) as link:
        for number in (1, 2):
            step(edge, link, number)
        restart(edge)
        with linked(edge, 1) as other:  # the same session by another stream, whose answer the device never saw
            assert other._steps_done == 0
        with pytest.raises(WentBack):
            step(edge, link, 3)
        assert step(edge, link, 1) == undisturbed(edge)[0]


def test_a_session_that_nobody_knows_is_lost(edge: ServedEdge, tmp_path: Path) -> None:
    with linked(edge, 1) as link:
        step(edge, link, 1)
        edge.stop()
        for path in (tmp_path / "sessions").iterdir():
            path.unlink()
        edge.start()
        restart(edge)
        with pytest.raises(SessionLostError, match="knows nothing of this device's session"):
            step(edge, link, 2)
        link.begin("another", 0, last_step=1, checkpoint=2)  # as the run does then
        session = edge.halves.engine.resume(edge.halves.request(session="another"))
        assert session is not None and (session.last_step, session.checkpoint) == (1, 2)
        step(edge, link, 2)


@pytest.mark.parametrize("held", [(), (5, 6)])
def test_a_device_without_the_edges_checkpoint_has_lost_its_session(edge: ServedEdge, held: tuple[int, ...]) -> None:
    with linked(edge, 1) as link:
        step(edge, link, 1, checkpoint=2)
    with linked(edge, *held, session="device-1-1") as link, pytest.raises(SessionLostError):
        link.resume("device-1-1")


def test_a_damaged_file_is_said_and_lost(edge: ServedEdge, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with linked(edge, 1) as link:
        step(edge, link, 1)
    (path,) = (tmp_path / "sessions").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    restart(edge)
    with linked(edge, 1, session="device-1-1") as link, pytest.raises(SessionLostError):
        link.resume("device-1-1")
    assert f"a session is lost: {path} is damaged" in caplog.text


def test_numbers_follow_each_other(edge: ServedEdge) -> None:
    with linked(edge, 1) as link, pytest.raises(RefusedError, match="checkpoint 3 of device-1 came, 2 was due"):
        step(edge, link, 1, checkpoint=3)


def test_a_half_is_sent_once_it_is_kept_and_by_the_next_edge_if_need_be(edge: ServedEdge) -> None:
    begin = edge_half(edge.halves.initial, 2)
    edge.federation.open.clear()  # submissions wait
    with linked(edge, 1) as link:
        for number in (1, 2):
            step(edge, link, number)
        before = values(edge)
        link.submit("s/1", 0, checkpoint=2)
        step(edge, link, 3, checkpoint=3)  # the half is in this one too, as nobody has it yet
        replace_federation(edge).failure = UnreachableError("it is away")
        restart(edge)
        eventually(lambda: not edge.service._uploads._running)
        assert not edge.federation.submitted and edge.service._uploads.unsent("device-1")
        edge.federation.failure = None
        with pytest.raises(WentBack):
            step(edge, link, 4)  # the device is back, and the half is tried again
        eventually(lambda: edge.federation.submitted)
        link.close()
    ((header, progress),) = edge.federation.submitted
    assert (header.submission, header.device, header.version) == ("s/1", "device-1", 0)
    assert all(np.array_equal(progress[key], before[key] - begin[key]) for key in begin)


def test_a_half_that_could_not_be_sent_is_sent_though_its_device_only_waits(
    edge: ServedEdge, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_after() -> None:
        sending.append(asyncio.create_task(edge.service.send_again()))

    sending: list[asyncio.Task[None]] = []
    monkeypatch.setattr(service, "_AGAIN_S", 0.05)
    with linked(edge, 1) as link:
        step(edge, link, 1)
        edge.federation.failure = UnreachableError("it was away for longer than give_up_s")
        link.submit("s/1", 0, checkpoint=2)
        eventually(lambda: not edge.service._uploads._running)
        edge.run(look_after())
        time.sleep(0.2)
        assert edge.service._uploads.unsent("device-1")
        edge.federation.failure = None
        eventually(lambda: [header.submission for header, _ in edge.federation.submitted] == ["s/1"])
        time.sleep(0.2)
        assert len(edge.federation.submitted) == 1 and not edge.service._uploads.unsent("device-1")
        edge.run(_cancelled(sending[0]))


async def _cancelled(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})


def starving(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Until it is set, no state can be read, as too many files are open."""
    real, room = session_files.read_state, threading.Event()

    def read(path: Path) -> Any:
        if not room.is_set():
            with no_more_files():
                return real(path)
        return real(path)

    monkeypatch.setattr(session_files, "read_state", read)
    return room


def test_a_session_that_cannot_be_read_for_a_moment_is_not_lost(edge: ServedEdge, monkeypatch: pytest.MonkeyPatch) -> None:
    with linked(edge, 1) as link:
        found = [step(edge, link, number, checkpoint=2 if number == 2 else 0) for number in (1, 2)]
        restart(edge)
        room = starving(monkeypatch)
        threading.Timer(0.3, room.set).start()
        with pytest.raises(WentBack) as back:
            step(edge, link, 3)
        assert room.is_set() and back.value.checkpoint == 2
        found[1:] = [step(edge, link, 2), step(edge, link, 3)]
    assert found == undisturbed(edge)[:3]


def test_halves_that_cannot_be_read_for_a_moment_are_sent_all_the_same(
    edge: ServedEdge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    edge.federation.open.clear()
    with linked(edge, 1) as link:
        step(edge, link, 1)
        link.submit("s/1", 0, checkpoint=2)
        replace_federation(edge)
        room = starving(monkeypatch)
        restart(edge)
        assert caplog.text.count("they are tried again every") == 1 and not edge.federation.submitted
        threading.Timer(0.3, room.set).start()
        step(edge, link, 2, checkpoint=3)  # the file is written anew, and has to have the half by then
    eventually(lambda: [header.submission for header, _ in edge.federation.submitted] == ["s/1"])


def test_a_device_outlives_an_edge_that_is_busy_with_what_it_cannot_send(
    edge: ServedEdge, caplog: pytest.LogCaptureFixture
) -> None:
    edge.federation.open.clear()
    threading.Timer(1.5, edge.federation.open.set).start()
    with linked(edge, 1, give_up_s=0.5) as link:
        step(edge, link, 1)
        for number in range(1, 21):
            link.submit(f"s/{number}", 0, checkpoint=number + 1)
            assert edge.federation.open.is_set() == (number > 16)
    assert "16 halves of submissions of device-1 wait here" in caplog.text
    eventually(lambda: len(edge.federation.submitted) == 20)
    assert [header.submission for header, _ in edge.federation.submitted] == [f"s/{number}" for number in range(1, 21)]


def test_a_device_that_waits_sees_that_its_edge_is_another(
    edge: ServedEdge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with linked(edge, 1) as link:
        step(edge, link, 1)
        link.submit("s/1", 0, checkpoint=2)
        link.look()
        edge.stop()
        eventually(lambda: link._stream is not None and link._stream.broken)
        link.look()
        assert "nothing is wanted of it yet" in caplog.text
        edge.start()
        restart(edge)
        eventually(lambda: link.look() or edge.halves.engine.devices())  # whose session is at its checkpoint again
        edge.stop()
        for path in (tmp_path / "sessions").iterdir():
            path.unlink()
        edge.start()
        restart(edge)
        eventually(lambda: link._stream is not None and link._stream.broken)
        with pytest.raises(SessionLostError):
            eventually(lambda: link.look())


def test_a_submission_asked_again_after_a_restart_is_the_same(edge: ServedEdge) -> None:
    with linked(edge, 1) as link:
        step(edge, link, 1)
        link.submit("s/1", 0, checkpoint=2)
        after = values(edge)
        restart(edge)
        link.submit("s/1", 0, checkpoint=2)
        assert all(np.array_equal(values(edge)[key], after[key]) for key in after)
        link.adopt(0, True, checkpoint=3)
        restart(edge)
        link.adopt(0, True, checkpoint=3)
        eventually(lambda: len(edge.federation.submitted) >= 2)  # once by each process; the federation server takes one
        one, other = (progress for _, progress in edge.federation.submitted[:2])
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_an_adoption_is_kept(edge: ServedEdge) -> None:
    newer = edge_half(edge.federation.publish(1), 2)
    with linked(edge, 1) as link:
        step(edge, link, 1)
        link.adopt(1, False, checkpoint=2)
        restart(edge)
        step(edge, link, 2, version=1)
        assert edge.federation.fetches == [0, 1]
    with linked(edge, 2, session="device-1-1") as link:
        assert link.resume("device-1-1") == 2
        assert all(np.array_equal(values(edge)[key], newer[key]) for key in newer)


def test_halves_of_an_earlier_session_are_sent_though_another_begins(edge: ServedEdge) -> None:
    edge.federation.open.clear()
    with linked(edge, 1) as link:
        step(edge, link, 1)
        link.submit("s/1", 0, checkpoint=2)
    with linked(edge, 1, request=edge.halves.request(session="another")) as link:
        step(edge, link, 1)
    replace_federation(edge)
    restart(edge)
    eventually(lambda: [header.submission for header, _ in edge.federation.submitted] == ["s/1"])


def test_a_pause_keeps_the_session_on_disk_alone(edge: ServedEdge, tmp_path: Path) -> None:
    expected = undisturbed(edge)
    with linked(edge, 1) as link:
        found = [step(edge, link, number) for number in (1, 2, 3)]
        link.pause(2)
        assert not edge.halves.engine.devices()
    with linked(edge, 2, session="device-1-1") as link:
        assert link.resume("device-1-1") == 2
        found += [step(edge, link, number) for number in range(4, STEPS + 1)]
        link.close()
    assert found == expected
    assert not list((tmp_path / "sessions").iterdir())


def test_what_is_closed_is_deleted_and_may_be_closed_again(edge: ServedEdge, tmp_path: Path) -> None:
    with linked(edge, 1) as link:
        step(edge, link, 1)
        edge.run(edge.service._close(edge.halves.engine.resume(edge.halves.request())))  # type: ignore[arg-type]
        assert not list((tmp_path / "sessions").iterdir())
        restart(edge)
        link.close()  # its answer was lost, and there is nothing left


@pytest.mark.parametrize("error", [StateWriteError("cannot write the session: no space left"), OSError(28, "no space left")])
def test_a_full_disk_holds_a_device_up_until_there_is_room(
    edge: ServedEdge, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real, room = session_files.write_state, threading.Event()

    def full(*arguments: Any) -> int:
        if not room.is_set():
            raise error
        return real(*arguments)

    with linked(edge, 1) as link:
        step(edge, link, 1)
        monkeypatch.setattr(session_files, "write_state", full)
        threading.Timer(0.5, room.set).start()
        before = values(edge)
        link.submit("s/1", 0, checkpoint=2)
        assert room.is_set() and "no space left" in caplog.text
        eventually(lambda: edge.federation.submitted)
        ((_, progress),) = edge.federation.submitted  # and it was taken once
        begin = edge_half(edge.halves.initial, 2)
        assert all(np.array_equal(progress[key], before[key] - begin[key]) for key in begin)
        room.clear()
    with linked(edge, 2, session="device-1-1", give_up_s=0.5) as link:
        link.resume("device-1-1")
        with pytest.raises(UnreachableError, match="no space left"):
            step(edge, link, 2, checkpoint=3)


def test_one_adapter_for_all_devices_has_no_checkpoint_of_one(edge: ServedEdge, caplog: pytest.LogCaptureFixture) -> None:
    shared = edge.halves.request(rules=TrainingRules(shared_edge_adapter=True))
    edge.federation.open.clear()
    with linked(edge, 1, request=shared) as link:
        step(edge, link, 1)
        link.submit("s/1", 0, checkpoint=2)
        step(edge, link, 2, checkpoint=3)
    with linked(edge, 2, 3, session="device-1-1", request=shared) as link, pytest.raises(SessionLostError):
        link.resume("device-1-1")
    assert "others train the same adapter" in caplog.text
    replace_federation(edge)
    restart(edge)
    eventually(lambda: [header.submission for header, _ in edge.federation.submitted] == ["s/1"])


def test_a_session_is_forgotten_in_memory_first(tmp_path: Path) -> None:
    with served(Halves(), keep_s=0.2, folder=tmp_path) as edge:
        with linked(edge, 1) as link:
            step(edge, link, 1)
        eventually(lambda: not edge.halves.engine.devices())
        with linked(edge, 1, session="device-1-1") as link:
            assert link.resume("device-1-1") == 1


def test_files_that_nobody_comes_back_to_are_swept(edge: ServedEdge, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with linked(edge, 1) as link:
        step(edge, link, 1)
        with linked(edge, 1, request=edge.halves.request("other")) as other:
            other.pause(2)
        files = edge._files
        assert files is not None
        files.sweep(60, edge.halves.engine.devices())
        assert len(list((tmp_path / "sessions").iterdir())) == 2
        time.sleep(0.05)
        files.sweep(0.01, edge.halves.engine.devices())
        assert files.read("device-1") is not None and files.read("other") is None
        assert "nobody has come back to the session in" in caplog.text


def test_a_sweep_bears_files_that_go_while_it_looks(tmp_path: Path) -> None:
    files, over = session_files.SessionFiles(tmp_path), threading.Event()

    def write() -> None:
        while not over.is_set():
            session_files.write_state(tmp_path / "busy.state", {}, {})

    (tmp_path / ".gone.state.tmp").symlink_to(tmp_path / "nothing")  # is listed, and cannot be looked at
    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            files.sweep(60, [])
    finally:
        over.set()
        writer.join(5)
    assert (tmp_path / "busy.state").exists()


def test_a_sweep_that_fails_is_said_and_is_not_the_last(
    edge: ServedEdge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sweeps: list[float] = []

    def sweep(self: session_files.SessionFiles, keep_s: float, in_use: Any) -> None:
        sweeps.append(keep_s)
        raise OSError(24, "Too many open files")

    async def work() -> None:
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(edge.service.sweep_hourly(0.05), 0.3)

    monkeypatch.setattr(session_files.SessionFiles, "sweep", sweep)
    edge.run(work())
    assert len(sweeps) > 1 and "Too many open files" in caplog.text


@pytest.mark.parametrize("name", ["..", "a/b", "x" * 300, "Gerät ☃", "%2e%2e", "A"])
def test_any_name_has_a_file_of_its_own(tmp_path: Path, name: str) -> None:
    halves = Halves()
    files = session_files.SessionFiles(tmp_path / "sessions")
    for each in (name, "a", "%2E%2E"):
        session = halves.engine.open(halves.request(each), halves.initial)
        files.write(halves.engine, session, 1, [])
    assert len(list((tmp_path / "sessions").iterdir())) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["sessions"]
    kept = files.read(name)
    assert kept is not None and kept.request.device == name and kept.checkpoint == 1


def test_told_to_stop_it_finishes_the_step(
    edge: ServedEdge, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    begun, real = threading.Event(), edge.halves.engine.step

    def slow(*arguments: Any) -> Any:
        begun.set()
        time.sleep(0.5)
        return real(*arguments)

    async def stop() -> None:
        edge.service.stop()

    with caplog.at_level(logging.WARNING, "sfl"), linked(edge, 1, give_up_s=0.5) as link:
        step(edge, link, 1)
        monkeypatch.setattr(edge.halves.engine, "step", slow)
        found: list[float] = []
        stepping = threading.Thread(target=lambda: found.append(step(edge, link, 2)))
        stepping.start()
        assert begun.wait(5)
        edge.run(stop())
        stepping.join(10)
        assert found == [undisturbed(edge)[1]]
        with pytest.raises(UnreachableError, match="told to stop"):
            step(edge, link, 3)


def test_sessions_of_another_federation_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    halves, ids = Halves(), ["first"]
    files = session_files.SessionFiles(tmp_path, lambda: ids[-1])
    half = TakenHalf("device-1", "s/1", 0, edge_half(halves.initial, 2))
    files.write(halves.engine, halves.engine.open(halves.request(), halves.initial), 1, [half])
    assert files.read("device-1") is not None
    (kept,) = files.halves()
    assert (kept.device, kept.submission, kept.version) == ("device-1", "s/1", 0)
    assert all(np.array_equal(kept.progress[key], value) for key, value in half.progress.items())
    ids.append("second")
    assert files.read("device-1") is None and not list(files.halves())
    assert "of another federation" in caplog.text
