"""What connections without any call may take of a server: files are left to it, and after a while their places."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import pytest

from sfl.v1 import federation_pb2 as pb
from sfl.v1.federation_pb2_grpc import FederationStub
from sfl.wire import channel
from tests.fed_server.test_service import join_request
from tests.identity.services import federation_server

ROOT = Path(__file__).parents[2]

SERVER = """
import asyncio, resource, sys
from sfl.wire.channel import serve
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))

async def main():
    server, address = serve("127.0.0.1:0")
    await server.start()
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], address, flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    files = [open("/dev/null") for _ in range(200)]
    print("200 files", flush=True)
    await server.stop(0)

asyncio.run(main())
"""


def test_strangers_leave_a_server_files_to_open() -> None:
    command = [sys.executable, "-c", SERVER]
    held: list[socket.socket] = []
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            limit, address = process.stdout.readline().split()
            assert limit == "400", "as much as it may have"
            host, _, port = address.rpartition(":")
            for _ in range(450):
                held.append(socket.create_connection((host, int(port)), timeout=5))
            time.sleep(0.3)
            said, errors = process.communicate("\n", timeout=20)
        finally:
            process.kill()
            for each in held:
                each.close()
    assert said == "200 files\n", errors
    assert "so it takes 144 connections at a time and not 4096 (limits.connections)" in errors


def test_a_connection_without_a_call_is_ended_and_a_client_makes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "IDLE_S", 0.5)
    with federation_server(tmp_path, None) as (address, fed, _), grpc.insecure_channel(address) as honest:
        FederationStub(honest).Join(join_request("a"), timeout=5)
        watch = FederationStub(honest).Watch(pb.WatchRequest(name="a"))
        next(watch)
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port)), timeout=5) as idle:
            started = time.monotonic()
            _only_answer_pings(idle)
            assert time.monotonic() - started < 4
        assert watch.is_active(), "that is no idle connection"
        watch.cancel()
        time.sleep(1.0)
        FederationStub(honest).Join(join_request("b"), timeout=5)
        assert fed.joined == 2


def _only_answer_pings(connection: socket.socket) -> None:
    """Speak HTTP/2 until the server ends it."""
    stream = connection.makefile("rwb")
    stream.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
    stream.flush()
    while head := stream.read(9):
        body = stream.read(int.from_bytes(head[:3], "big"))
        if (head[3], head[4]) == (6, 0):
            stream.write(head[:4] + b"\1" + head[5:] + body)
            stream.flush()
