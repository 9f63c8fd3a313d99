"""gRPC's health protocol, and the command that asks it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from sfl.cli.main import app
from sfl.errors import AddressError, MissingPackageError, RefusedError, SflError, UnreachableError
from sfl.watching.endpoint import Endpoint, json_page
from sfl.watching.health import Health, require_serving
from sfl.wire.channel import dial, serve

TRAINING = "sfl.v1.SplitTraining"


@contextmanager
def serving() -> Iterator[tuple[str, Callable[[str], None]]]:
    """A server with a service that is starting; its address, and a function that calls a method of its `Health`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start() -> tuple[str, Health, object]:
        server, address = serve("127.0.0.1:0")
        health = Health(server)
        await health.serving("")
        await health.starting(TRAINING)
        await server.start()
        return address, health, server

    def run(work: object) -> object:
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)  # type: ignore[arg-type]

    address, health, server = run(start())  # type: ignore[misc]
    try:
        yield address, lambda what: run(health.stopping() if what == "stopping" else health.serving(TRAINING))
    finally:
        run(server.stop(0))  # type: ignore[attr-defined]
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


def ask(address: str, service: str = "") -> SflError | None:
    channel = dial(address, "the server", 5)
    try:
        require_serving(channel, "the server", service, 5)
    except SflError as error:
        return error
    finally:
        channel.close()
    return None


def test_a_server_serves_before_its_services_do() -> None:
    with serving() as (address, tell):
        assert ask(address) is None
        assert "NOT_SERVING" in str(ask(address, TRAINING))
        tell("serving")
        assert ask(address, TRAINING) is None
        assert isinstance(ask(address, "no.such.Service"), RefusedError)
        tell("stopping")
        assert isinstance(ask(address), RefusedError)


def sfl_health(*arguments: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, ["health", *arguments])
    return result.output, result.exception


def test_the_command_says_it_by_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFL_LISTEN", "0.0.0.0:7301")  # as in a daemon's container
    with serving() as (address, _):
        assert sfl_health(address) == ("serving\n", None)
        assert isinstance(sfl_health(address, "--service", TRAINING)[1], RefusedError)
    assert isinstance(sfl_health(address, "--wait-s", "0.2")[1], UnreachableError)
    assert isinstance(sfl_health("nowhere")[1], AddressError)


def test_a_devices_page() -> None:
    pages = {"/healthz": lambda accept: json_page(200, {"ready": True}), "/not": lambda accept: json_page(503, {"ready": False})}
    endpoint = Endpoint("127.0.0.1:0", pages)
    url = f"http://{endpoint.address}"
    try:
        assert sfl_health(f"{url}/healthz") == ('{"ready": true}\n', None)
        assert 'says 503: {"ready": false}' in str(sfl_health(f"{url}/not")[1])
    finally:
        endpoint.close()
    assert isinstance(sfl_health(f"{url}/healthz", "--wait-s", "1")[1], UnreachableError)
    assert isinstance(sfl_health("ftp://somewhere/healthz")[1], SflError)


def test_a_devices_image_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "grpc_health.v1", None)
    monkeypatch.delitem(sys.modules, "sfl.watching.health")
    error = sfl_health("127.0.0.1:7301")[1]
    assert isinstance(error, MissingPackageError)
    assert "grpcio-health-checking" in str(error) and "/healthz" in str(error) and "\n" not in str(error)


def test_it_says_how_it_is_called() -> None:
    output, error = sfl_health()
    assert "usage: sfl health ADDRESS" in output
    assert isinstance(error, SystemExit)
    assert error.code == 2
