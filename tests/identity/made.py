"""What the tests of identity share: authorities made on the spot, and services behind TLS and the guard on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from sfl.connection_settings import LimitSettings
from sfl.identity.folder import CertificateFolder, Wanted
from sfl.identity.identity import Identity, Role
from sfl.identity.node import Node, NodeFiles
from sfl.identity.revoked import Revocations
from sfl.identity.rights import Serves
from sfl.wire.channel import dial, serve
from sfl.wire.guard import Guard

ROLES: dict[str, Role] = {
    "fed": "fed",
    "edge-1": "edge",
    "edge-2": "edge",
    "pi-1": "device",
    "pi-2": "device",
    "anna": "operator",
}


def wanted(name: str, *hosts: str) -> Wanted:
    """A node of `ROLES`; a server is at 127.0.0.1 unless told otherwise."""
    role = ROLES[name]
    return Wanted(Identity(role, name), hosts or (("127.0.0.1",) if role in ("fed", "edge") else ()))


@dataclass
class Certificates:
    """An authority with a certificate for each name of `ROLES`."""

    folder: Path
    days: float = 365.0
    book: CertificateFolder = field(init=False)

    def __post_init__(self) -> None:
        self.book = CertificateFolder.make(self.folder, [wanted(name) for name in ROLES], days=self.days)

    def files(self, name: str) -> NodeFiles:
        return NodeFiles.within(self.folder / "nodes" / name)

    def node(self, name: str) -> Node:
        return Node(self.files(name))

    def revoke(self, name: str) -> None:
        """All nodes have the new list at once."""
        self.book.revoke(name)

    def guard(self, server: str, limits: LimitSettings | None = None, serves: Serves = lambda device, edge: None) -> Guard:
        files = self.files(server)
        return Guard(limits or LimitSettings(), Revocations(files.revoked, files.ca), serves)


@contextlib.contextmanager
def behind(
    guard: Guard | None,
    node: Node | None,
    *add: Callable[[Any], None],
    address: str = "127.0.0.1:0",
    connections: int = 100,
) -> Iterator[str]:
    """A server with these services, on a loop in a thread of its own; gives its address. `add` is called on that loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[Any, str]:
        server, bound = serve(address, node, guard, connections)
        for each in add:
            each(server)
        await server.start()
        return server, bound

    server, bound = asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    try:
        yield bound
    finally:
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextlib.contextmanager
def dialled(address: str, node: Node | None) -> Iterator[grpc.Channel]:
    channel = dial(address, "the server", 10, node)
    try:
        yield channel
    finally:
        channel.close()


def refused(call: Callable[[], Any]) -> tuple[str, str]:
    """The status and the words with which a call fails."""
    try:
        call()
    except grpc.RpcError as error:
        return error.code().name, error.details()
    raise AssertionError("the call was not refused")
