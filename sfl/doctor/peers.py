"""The way to a server, one step after the other: name, route, TLS, and whether it serves. Then its clock against this one."""

from __future__ import annotations

import math
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from sfl.doctor.finding import Finding, broke, failed, passed, skipped, warned
from sfl.errors import PeerIdentityError, SflError
from sfl.identity.identity import Role
from sfl.identity.node import Node
from sfl.wire.address import check_address, connect, is_loopback
from sfl.wire.channel import dial
from sfl.wire.tls import check_peer, require_plaintext

WAIT_S = 5.0  # for any answer
_SKEW_WARN_S, _SKEW_FAIL_S = 2.0, 300.0  # certificates that are just made are valid from an hour before

Result = TypeVar("Result")


@dataclass(frozen=True)
class Server:
    """A server to be reached: what it is called in messages, where it is, its role, and who this node is, None without TLS."""

    peer: str
    address: str
    role: Role
    node: Node | None

    def name(self, step: str) -> str:
        return f"{self.peer.removeprefix('the ')}: {step}"


def check_way(server: Server) -> Iterator[Finding]:
    """Name, route, TLS, health; after the first that fails nothing more is tried."""
    steps: tuple[tuple[str, Callable[[Server], Finding]], ...] = (
        ("name", _name),
        ("route", _route),
        ("TLS", _tls),
        ("service", _service),
    )
    for index, (_, step) in enumerate(steps):
        finding = step(server)
        yield finding
        if finding.state == "failed":
            for name, _ in steps[index + 1 :]:
                yield skipped(server.name(name), "not tried")
            return


def timed(call: Callable[[], Result], told: Callable[[Result], float]) -> tuple[Result, float]:
    """What `call` returns, and by how many seconds the clock that it was `told` is ahead of this one."""
    before = time.time()
    result = call()
    return result, told(result) - (before + time.time()) / 2


def check_clock(server: Server, ahead_s: float) -> Finding:
    """`ahead_s` is how far the server's clock is ahead of this machine's."""
    name = server.name("clock")
    if not math.isfinite(ahead_s) or abs(ahead_s) > 1e8:
        return skipped(name, "it did not tell its time: does it run the same version of sfl?")
    line = f"{'ahead of' if ahead_s >= 0 else 'behind'} this machine's by {abs(ahead_s):.1f} s"
    if abs(ahead_s) < _SKEW_WARN_S:
        return passed(name, line)
    advice = "set both clocks by NTP (timedatectl set-ntp true)"
    return (failed if abs(ahead_s) > _SKEW_FAIL_S else warned)(name, line, advice)


def _name(server: Server) -> Finding:
    host, port = check_address(server.address)
    name = server.name("name")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except OSError as error:
        why = f"'{host}' is not known ({error.strerror or error})"
        return failed(
            name, why, "is it spelt right? A name must be in DNS or in /etc/hosts of this machine; an IP address works too"
        )
    return passed(name, f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in found))}")


def _route(server: Server) -> Finding:
    name, started = server.name("route"), time.perf_counter()
    try:
        connect(server.address, WAIT_S).close()
    except ConnectionRefusedError:
        why = f"{server.address} refuses connections"
        return failed(name, why, f"is {server.peer} running there, with this port in its `listen`, and not on 127.0.0.1 only?")
    except TimeoutError:
        why = f"{server.address} did not answer in {WAIT_S:g} s"
        return failed(name, why, "is the machine on? Does a firewall there or on the way let this port through?")
    except OSError as error:
        return failed(name, f"{server.address}: {error.strerror or error}", "is there a network that leads there?")
    return passed(name, f"{server.address} answers after {1000 * (time.perf_counter() - started):.1f} ms")


def _tls(server: Server) -> Finding:
    name = server.name("TLS")
    try:
        if server.node is not None:
            check_peer(server.address, server.peer, server.node, server.role, WAIT_S)
            return passed(name, "both certificates are accepted")
        require_plaintext(server.address, server.peer, WAIT_S)
    except PeerIdentityError as error:
        return broke(name, error)
    if is_loopback(server.address):
        return passed(name, "none, on this machine itself")
    return warned(name, "none: anyone on the way can read and change what passes", "make certificates with `sfl certs make`")


def _service(server: Server) -> Finding:
    name = server.name("service")
    try:
        from sfl.watching.health import require_serving
    except ModuleNotFoundError:
        return skipped(name, "not asked: grpcio-health-checking is not installed, which a device does without")
    try:
        channel = dial(server.address, server.peer, WAIT_S, server.node, server.role)
        try:
            require_serving(channel, server.peer, "", WAIT_S)
        finally:
            channel.close()
    except SflError as error:
        return broke(name, error)
    return passed(name, "it serves")
