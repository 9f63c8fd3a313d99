"""The compute worker: one job at a time, in the chosen order, and no job can harm another."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from functools import partial

import pytest

from sfl.edge_server.worker import ORDERS, ComputeWorker, Job, ServeOrder, arrival, longest_tail
from sfl.errors import SflError

CUTS = [2, 3, 1, 3, 2]


@pytest.fixture
def worker() -> Iterator[ComputeWorker]:
    made = ComputeWorker(arrival)
    yield made
    made.stop()


@pytest.mark.parametrize(("order", "expected"), [(arrival, [0, 1, 2, 3, 4]), (longest_tail, [1, 3, 0, 4, 2])])
def test_orders(order: ServeOrder, expected: list[int]) -> None:
    assert order in ORDERS.values()
    waiting = [Job(cut, partial(int, number)) for number, cut in enumerate(CUTS)]
    assert [waiting.pop(order(waiting)).compute() for _ in CUTS] == expected


@pytest.mark.parametrize(("order", "expected"), [("arrival", [0, 1, 2, 3, 4]), ("longest-tail", [1, 3, 0, 4, 2])])
def test_what_waits_is_served_in_order_one_at_a_time(order: str, expected: list[int]) -> None:
    worker = ComputeWorker(dict(ORDERS)[order])  # type: ignore[index]
    gate, served, running = threading.Event(), [], []

    def job(number: int) -> int:
        running.append(number)
        assert len(running) == 1
        time.sleep(0.005)
        served.append(number)
        running.remove(number)
        return number

    first = worker.submit(1, lambda: gate.wait(5))
    time.sleep(0.05)  # it is being computed, so that all others wait
    futures = [worker.submit(cut, partial(job, number)) for number, cut in enumerate(CUTS)]
    gate.set()
    assert first.result(5)
    assert [future.result(5) for future in futures] == [0, 1, 2, 3, 4]
    assert served == expected
    worker.stop()


def test_an_exception_reaches_its_caller_and_the_worker_lives_on(worker: ComputeWorker) -> None:
    def broken() -> None:
        raise ZeroDivisionError("in a job")

    failing, good = worker.submit(1, broken), worker.submit(1, lambda: 7)
    with pytest.raises(ZeroDivisionError, match="in a job"):
        failing.result(5)
    assert good.result(5) == 7


def test_a_job_cancelled_in_time_is_not_computed(worker: ComputeWorker) -> None:
    gate, computed = threading.Event(), []
    blocking = worker.submit(1, lambda: gate.wait(5))
    time.sleep(0.05)
    cancelled = worker.submit(1, lambda: computed.append("cancelled"))
    after = worker.submit(1, lambda: computed.append("after"))
    assert not blocking.cancel()
    assert cancelled.cancel()
    gate.set()
    after.result(5)
    assert computed == ["after"]


def test_stop_finishes_the_job_at_hand_and_cancels_the_rest() -> None:
    worker = ComputeWorker(arrival)
    begun = threading.Event()

    def slow() -> str:
        begun.set()
        time.sleep(0.1)
        return "done"

    at_hand, waiting = worker.submit(1, slow), worker.submit(1, lambda: "never")
    assert begun.wait(5)
    worker.stop()
    assert at_hand.result(0) == "done"
    with pytest.raises(CancelledError):
        waiting.result(0)
    with pytest.raises(SflError, match="shutting down"):
        worker.submit(1, lambda: None)


@pytest.mark.parametrize("order", [lambda waiting: 99, lambda waiting: 1 // 0, lambda waiting: None])
def test_an_order_that_fails_is_replaced_by_that_of_arrival(order: ServeOrder, caplog: pytest.LogCaptureFixture) -> None:
    worker = ComputeWorker(order)
    with caplog.at_level(logging.ERROR, "sfl"):
        assert [worker.submit(1, partial(int, number)).result(5) for number in range(3)] == [0, 1, 2]
    worker.stop()
    assert "the serve order failed" in caplog.text


def test_an_idle_worker_sleeps(worker: ComputeWorker) -> None:
    worker.submit(1, lambda: None).result(5)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.05
