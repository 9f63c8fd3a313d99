"""SIGTERM and Ctrl-C: at once where nothing is lost, after the step where something would be, and never later than its grace."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from sfl.device.stop import GRACE_S, Stopped, StopSignal
from sfl.errors import UnreachableError
from sfl.watching.watch import LAST_S


def tell(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def tell_later() -> None:
    """By when the test waits for something."""
    threading.Timer(0.1, tell).start()


def test_the_grace_and_the_last_report_leave_a_second_until_a_container_engine_kills() -> None:
    assert 0 < LAST_S < GRACE_S < 9 - LAST_S


def test_a_wait_ends_at_once() -> None:
    started = time.monotonic()
    with StopSignal() as stop, pytest.raises(Stopped):
        tell_later()
        time.sleep(10)
    assert stop.told and 0.1 <= time.monotonic() - started < 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_step_is_finished_first(number: signal.Signals) -> None:
    done = []
    with StopSignal() as stop, pytest.raises(Stopped):
        with stop.held():
            tell(number)
            assert stop.told
            done.append("step")
        done.append("another")
    assert done == ["step"]


def test_a_wait_inside_ends_at_once_and_what_holds_it_comes_to_its_end() -> None:
    done = []
    started = time.monotonic()
    with StopSignal() as stop, pytest.raises(Stopped):
        with stop.held():
            tell_later()
            with pytest.raises(Stopped), stop.let_go():
                time.sleep(10)
            done.append("kept")
            with pytest.raises(Stopped), stop.let_go():
                done.append("another wait")
            done.append("held again")
        done.append("another step")
    assert done == ["kept", "held again"] and time.monotonic() - started < 2


def test_a_step_that_takes_too_long_is_not() -> None:
    started = time.monotonic()
    with StopSignal(grace_s=0.1) as stop, pytest.raises(Stopped), stop.held():
        tell()
        time.sleep(10)
    assert 0.1 <= time.monotonic() - started < 2


def test_a_second_signal_does_not_wait() -> None:
    started = time.monotonic()
    with StopSignal() as stop, pytest.raises(Stopped), stop.held():
        tell()
        tell_later()
        time.sleep(10)
    assert 0.1 <= time.monotonic() - started < 2, "and so not its grace"


def test_an_error_on_the_way_out_is_none() -> None:
    with StopSignal() as stop, pytest.raises(Stopped), stop.held():
        tell()
        raise UnreachableError("the edge is away")
    with StopSignal() as stop, pytest.raises(UnreachableError), stop.held():
        raise UnreachableError("the edge is away")


def test_what_was_there_before_is_there_again() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignal(grace_s=0.2) as stop, pytest.raises(Stopped), stop.held():
        tell()
    assert [signal.getsignal(number) for number in numbers] == before
    time.sleep(0.3)  # the alarm does not come either
