"""Mutual TLS: who gets a connection, who gets none, and that whoever gets none is told why, at once."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from sfl.errors import PeerIdentityError, UnreachableError
from sfl.identity.identity import Identity
from sfl.identity.node import Node
from sfl.identity.peer import peer_of
from sfl.wire import channel as channel_module
from sfl.wire.channel import dial
from sfl.wire.tls import client_credentials
from tests.identity.made import Certificates, behind, dialled, refused

PEER = "the edge server"


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return Certificates(tmp_path_factory.mktemp("certs"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Another authority, with nodes of the same names."""
    return Certificates(tmp_path_factory.mktemp("others"))


class Service:
    """Says who calls: one handler for any name."""

    def __init__(self) -> None:
        self.heard: list[Identity | None] = []

    def add(self, server: Any) -> None:
        async def who(request: bytes, context: Any) -> bytes:
            peer = peer_of(context.auth_context())
            self.heard.append(None if peer is None else peer.identity)
            return request

        handlers = {"Who": grpc.unary_unary_rpc_method_handler(who)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))


def ask(channel: grpc.Channel) -> bytes:
    answer: bytes = channel.unary_unary("/test/Who")(b"hello", timeout=5)
    return answer


@contextlib.contextmanager
def edge_1(certificates: Certificates, node: Node | None = None, **changes: Any) -> Iterator[tuple[str, Service]]:
    service = Service()
    with behind(None, node or certificates.node("edge-1"), service.add, **changes) as address:
        yield address, service


def fails(address: str, node: Node | None, why: str, **changes: Any) -> None:
    """Dialling ends at once though there is time to wait, with these words."""
    started = time.monotonic()
    with pytest.raises(PeerIdentityError, match=why):
        dial(address, PEER, 30, node, **changes)
    assert time.monotonic() - started < 5


def test_both_ends_know_each_other(certificates: Certificates) -> None:
    with edge_1(certificates) as (address, service), dialled(address, certificates.node("pi-1")) as channel:
        assert ask(channel) == b"hello"
    assert service.heard == [Identity("device", "pi-1")]


@pytest.mark.parametrize("host", ["localhost", "[::1]"])
def test_every_name_in_the_certificate_will_do(certificates: Certificates, host: str) -> None:
    if host == "[::1]" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with edge_1(certificates, address=f"{host}:0") as (address, _), dialled(address, certificates.node("pi-1")) as channel:
        assert ask(channel) == b"hello"


def test_a_stranger_without_a_certificate_gets_nothing(certificates: Certificates) -> None:
    with edge_1(certificates) as (address, service):
        fails(address, None, "the edge server at 127.0.0.1:.* wants TLS: give this node a certificate of the same authority")
        trusting = grpc.ssl_channel_credentials(certificates.node("pi-1").shown().ca)
        for channel in (grpc.insecure_channel(address), grpc.secure_channel(address, trusting)):
            with channel:
                assert refused(lambda channel=channel: ask(channel))[0] == "UNAVAILABLE"
    assert service.heard == []


def test_a_certificate_of_another_authority_gets_nothing(certificates: Certificates, others: Certificates) -> None:
    with edge_1(certificates) as (address, service):
        fails(address, others.node("pi-1"), "cannot be trusted: it was given out by another authority than the one of ca.pem")
        # Even a stranger that trusts whom it should.
        shown = replace(others.node("pi-1").shown(), ca=certificates.node("pi-1").shown().ca)
        with grpc.secure_channel(address, client_credentials(shown)) as channel:
            assert refused(lambda: ask(channel))[0] == "UNAVAILABLE"
    assert service.heard == []


def test_an_expired_certificate_gets_nothing_and_is_told_so(
    certificates: Certificates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Certificates(tmp_path)
    node, server = made.node("pi-1"), made.node("edge-1")
    made.book.renew("pi-1", days=-0.01)  # what a node holds whose clock is behind, or that was started before the end
    files = made.files("pi-1")
    shown = replace(node.shown(), certificate=files.certificate.read_bytes(), key=files.key.read_bytes())
    with edge_1(made, server) as (address, service):
        with grpc.secure_channel(address, client_credentials(shown)) as channel:
            assert refused(lambda: ask(channel))[0] == "UNAVAILABLE"
        fails(address, node, "does not accept the certificate of device 'pi-1': .* not valid by that machine's clock")
    assert service.heard == []


def test_a_server_under_another_name_is_named(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    made.book.renew("edge-1", ("edge.lan",))
    # Another address of this machine, which is not in the certificate.
    with edge_1(made, address="127.0.0.2:0") as (address, service):
        why = r"is not for '127.0.0.2': dial it by a name that is in it .*`sfl certs renew NAME=127.0.0.2`"
        fails(address, made.node("pi-1"), why)
    assert service.heard == []


def test_a_server_in_another_role_is_named(certificates: Certificates) -> None:
    with edge_1(certificates) as (address, _):
        why = "is edge server 'edge-1', and not the edge server: is a federation server's address wrong"
        fails(address, certificates.node("pi-1"), why, role="fed")
        dial(address, PEER, 10, certificates.node("pi-1"), "edge").close()


def test_a_device_cannot_pass_for_a_server(certificates: Certificates) -> None:
    with edge_1(certificates, certificates.node("pi-2")) as (address, _):
        fails(address, certificates.node("pi-1"), "cannot be trusted: it is not made for this end of a connection")


def test_a_revoked_server_is_not_dialled(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    with edge_1(made) as (address, _):
        made.revoke("edge-1")
        fails(address, made.node("pi-1"), "cannot be trusted: it is revoked")


def test_an_expired_server_is_named(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    server = made.node("edge-1")
    made.book.renew("edge-1", days=-0.01)
    files = made.files("edge-1")
    server._shown = replace(server.shown(), certificate=files.certificate.read_bytes(), key=files.key.read_bytes())
    server._stamp = files.stamp()
    with edge_1(made, server) as (address, _):
        fails(address, made.node("pi-1"), "the certificate of the edge server at .* cannot be trusted: it has expired")


def test_a_server_without_tls_is_named(certificates: Certificates) -> None:
    with behind(None, None, Service().add) as address:
        fails(address, certificates.node("pi-1"), "does not speak TLS: give it a certificate too")


@pytest.mark.parametrize("speaks", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_whatever_else_listens_there_is_waited_for_or_named_and_never_for_ever(certificates: Certificates, speaks: bytes) -> None:
    def answer(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                if speaks:
                    connection.sendall(speaks)
                    connection.close()
                kept.append(connection)

    kept: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=answer, args=(listener,), daemon=True).start()
        started = time.monotonic()
        with pytest.raises((PeerIdentityError, UnreachableError), match=r"does not speak TLS|did not answer within 1 s"):
            dial(f"127.0.0.1:{listener.getsockname()[1]}", PEER, 1, certificates.node("pi-1"))
        assert time.monotonic() - started < 5
    for connection in kept:
        connection.close()


def test_dial_waits_for_a_server_that_comes_later(certificates: Certificates) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    found: list[grpc.Channel] = []
    node = certificates.node("pi-1")
    thread = threading.Thread(target=lambda: found.append(dial(address, PEER, 20, node)))
    thread.start()
    time.sleep(0.3)
    with edge_1(certificates, address=address):
        thread.join(20)
        assert ask(found[0]) == b"hello"
        found[0].close()


def test_renewed_certificates_are_shown_on_new_connections_without_a_restart(tmp_path: Path) -> None:
    made = Certificates(tmp_path)
    device = made.node("pi-1")
    with edge_1(made) as (address, service), dialled(address, device) as channel:
        assert ask(channel) == b"hello"
        made.book.renew("pi-1")
        made.book.renew("edge-1", ("127.0.0.1", "edge.lan"))
        fresh = device.shown()
        assert ask(channel) == b"hello"  # on a connection of its own, with the new certificate
        assert len(channel._channels) == 2  # type: ignore[attr-defined]
        with grpc.secure_channel(
            address, client_credentials(fresh), options=(("grpc.ssl_target_name_override", "edge.lan"),)
        ) as other:
            assert ask(other) == b"hello"  # the server shows its new one, too
        assert len(service.heard) == 3


def test_an_authority_that_was_replaced_is_trusted_from_the_next_connection_on(tmp_path: Path) -> None:
    first, second = Certificates(tmp_path / "1"), Certificates(tmp_path / "2")
    with edge_1(first) as (address, _):
        fails(address, second.node("pi-1"), "given out by another authority")
        for file in ("ca", "revoked", "certificate", "key"):
            getattr(first.files("edge-1"), file).write_bytes(getattr(second.files("edge-1"), file).read_bytes())
        with dialled(address, second.node("pi-1")) as channel:
            assert ask(channel) == b"hello"


def test_who_is_refused_is_left_without_a_traceback_of_a_thread(
    certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> None:
        raise PeerIdentityError("refused")

    raised: list[object] = []
    monkeypatch.setattr(channel_module, "check_peer", refuses)
    monkeypatch.setattr(threading, "excepthook", lambda failure: raised.append(failure.exc_value))
    for _ in range(3):
        with pytest.raises(PeerIdentityError):
            dial("127.0.0.1:9", PEER, 1, certificates.node("pi-1"))
    time.sleep(0.3)  # for what its threads have left to do
    assert raised == []


def test_a_server_takes_so_many_connections_and_no_more() -> None:
    def is_open(connection: socket.socket) -> bool:
        connection.settimeout(1.0)
        try:
            return connection.recv(1) != b""  # gRPC speaks first
        except OSError:
            return False

    with behind(None, None, Service().add, connections=3) as address:
        host, _, port = address.rpartition(":")
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(8)]
            assert 1 <= sum(map(is_open, sockets)) <= 3
