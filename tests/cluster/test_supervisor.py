"""Children live and die together, shown with small Python scripts as children."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from sfl.cluster.supervisor import ChildError, Program, Supervisor, last_error

SERVE = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, lambda *_: (print("asked to stop"), sys.exit(0)))
    print("serving", flush=True)
    time.sleep(60)
"""
STUBBORN = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("serving", flush=True)
    while True:
        time.sleep(60)
"""


def program(folder: Path, name: str, script: str, ends: bool = True) -> Program:
    return Program(name, [sys.executable, "-c", textwrap.dedent(script)], folder / name / "log.txt", ends)


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while not path.is_file() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{path} never said {text}"
        time.sleep(0.02)


def gone(pids: dict[str, int]) -> bool:
    return not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids.values())


def test_servers_stop_when_the_workers_have_ended(tmp_path: Path) -> None:
    ticks: list[int] = []
    worker = program(tmp_path, "worker", "import time; time.sleep(0.8)")
    supervisor = Supervisor([program(tmp_path, "server", SERVE, ends=False), worker])
    supervisor.run(lambda: ticks.append(1))
    assert gone(supervisor.pids()) and len(supervisor.pids()) == 2
    assert "asked to stop" in (tmp_path / "server/log.txt").read_text()
    assert len(ticks) >= 3


def test_a_failure_names_the_child_its_code_its_error_and_its_log(tmp_path: Path) -> None:
    failing = "import sys; print('error: the cut is too deep', file=sys.stderr); print('bye', file=sys.stderr); sys.exit(7)"
    programs = [program(tmp_path, "server", SERVE, ends=False), program(tmp_path, "bad", failing)]
    programs.append(program(tmp_path, "long", "import time; time.sleep(60)"))
    supervisor = Supervisor(programs)
    started = time.monotonic()
    with pytest.raises(ChildError) as caught:
        supervisor.run()
    assert time.monotonic() - started < 15
    assert "bad failed with exit code 7: error: the cut is too deep" in str(caught.value)
    assert str(tmp_path / "bad/log.txt") in str(caught.value)
    assert gone(supervisor.pids()) and len(supervisor.pids()) == 3


def test_a_traceback_is_told_by_its_last_line(tmp_path: Path) -> None:
    with pytest.raises(ChildError, match="exit code 1: ValueError: no such layer"):
        Supervisor([program(tmp_path, "bad", "raise ValueError('no such layer')")]).run()


def test_a_server_that_ends_early_is_a_failure(tmp_path: Path) -> None:
    programs = [program(tmp_path, "server", "print('nothing to do')", ends=False)]
    programs.append(program(tmp_path, "worker", "import time; time.sleep(60)"))
    with pytest.raises(ChildError, match=r"server ended while it was still needed \(exit code 0\): nothing to do"):
        Supervisor(programs).run()


def test_a_server_that_fails_when_told_to_stop_is_a_failure(tmp_path: Path) -> None:
    script = SERVE.replace("sys.exit(0)", "sys.exit(3)")
    server = program(tmp_path, "server", script, ends=False)
    ready = f"""
        import pathlib, time
        while not pathlib.Path({str(server.log)!r}).read_text().startswith("serving"):
            time.sleep(0.02)
    """
    with pytest.raises(ChildError, match="server failed with exit code 3"):
        Supervisor([server, program(tmp_path, "worker", ready)]).run()


def test_a_child_killed_from_outside_is_a_failure(tmp_path: Path) -> None:
    supervisor = Supervisor([program(tmp_path, "worker", "import time; print('on', flush=True); time.sleep(60)")])

    def kill() -> None:
        os.kill(supervisor.pids()["worker"], signal.SIGKILL)

    with pytest.raises(ChildError, match="worker was killed by SIGKILL"):
        supervisor.run(kill)


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    stubborn = program(tmp_path, "stubborn", STUBBORN, ends=False)
    ready = f"""
        import pathlib, sys, time
        while not pathlib.Path({str(stubborn.log)!r}).read_text().startswith("serving"):
            time.sleep(0.02)
        sys.exit(1)
    """
    supervisor = Supervisor([stubborn, program(tmp_path, "bad", ready)], grace_s=0.6)
    with pytest.raises(ChildError, match="bad failed"):
        supervisor.run()
    assert gone(supervisor.pids())
    polite = Supervisor([stubborn, program(tmp_path, "good", ready.replace("sys.exit(1)", ""))], grace_s=0.6, finish_s=0.4)
    with pytest.raises(ChildError, match=r"stubborn did not end within 0.4 s of SIGTERM"):
        polite.run()
    assert gone(polite.pids())


def test_an_exception_of_the_callers_stops_all(tmp_path: Path) -> None:
    supervisor = Supervisor([program(tmp_path, "worker", "import time; time.sleep(60)")])
    with pytest.raises(ZeroDivisionError):
        supervisor.run(lambda: 1 // 0)
    assert gone(supervisor.pids())


def test_a_program_that_is_not_there(tmp_path: Path) -> None:
    supervisor = Supervisor(
        [
            program(tmp_path, "worker", "import time; time.sleep(60)"),
            Program("none", ["/no/such"], tmp_path / "none/log.txt", True),
        ]
    )
    with pytest.raises(ChildError, match="none could not be started"):
        supervisor.run()
    assert gone(supervisor.pids())


PARENT = """
    import sys
    from pathlib import Path
    from sfl.cluster.supervisor import Program, Supervisor
    script = "import time, signal; {ignore}print('on', flush=True); time.sleep(60)"
    out = Path(sys.argv[1])
    supervisor = Supervisor([Program(name, [sys.executable, "-c", script], out / name, True) for name in ("a", "b")], grace_s=1.0)
    def tell():
        (out / "pids").write_text(" ".join(str(pid) for pid in supervisor.pids().values()))
    try:
        supervisor.run(tell)
    except KeyboardInterrupt:
        sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
@pytest.mark.parametrize("ignore", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN); "], ids=["polite", "stubborn"])
def test_no_child_outlives_its_parent(tmp_path: Path, number: signal.Signals, ignore: str) -> None:
    if number == signal.SIGKILL and not sys.platform.startswith("linux"):
        pytest.skip("only Linux kills the children of a killed process")
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(PARENT).replace("{ignore}", ignore), str(tmp_path)])
    try:
        wait_for(tmp_path / "a", "on")
        wait_for(tmp_path / "b", "on")
        wait_for(tmp_path / "pids", " ")
        pids = {str(i): int(pid) for i, pid in enumerate((tmp_path / "pids").read_text().split())}
        parent.send_signal(number)
        assert parent.wait(10) == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while not gone(pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(pids) == 2 and gone(pids)


def test_signal_handlers_are_given_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    Supervisor([program(tmp_path, "worker", "pass")]).run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", ""),
        ("10:00:00 INFO fine\n10:00:01 ERROR lost the edge\n10:00:02 INFO stopping\n", "10:00:01 ERROR lost the edge"),
        ("error: first\nerror: second\ntail\n\n", "error: second"),
        ("only\nlines\n", "lines"),
        ("error SFL-602: the models differ\nbye\n", "error SFL-602: the models differ"),
        ("x" * 200_000 + "\nerror: at the end\n", "error: at the end"),
    ],
)
def test_last_error(tmp_path: Path, content: str, expected: str) -> None:
    log = tmp_path / "log.txt"
    assert last_error(log) == ""
    log.write_text(content)
    assert last_error(log) == expected
