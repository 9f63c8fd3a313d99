"""From a daemon's settings to who it is, and to the guard before its services."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfl.errors import OwnCertificateError, PlaintextError
from sfl.identity.identity import Role, called
from sfl.identity.node import Node
from sfl.telemetry import log
from sfl.wire.address import check_address, is_loopback

if TYPE_CHECKING:
    from sfl.identity.rights import Serves
    from sfl.settings import DaemonSettings, EdgeSettings, FedSettings
    from sfl.wire.guard import Guard

_ADDRESSES = ("listen", "federation", "edge")  # settings that hold one; no daemon has all three
_ANY = ("0.0.0.0", "[::]")  # addresses to listen on that stand for all of this machine's


def node_of(settings: DaemonSettings, role: Role) -> Node | None:
    """Who this daemon is; None where it has no certificate, on loopback or because `tls.plaintext` says so.

    Raises `PlaintextError` for other addresses, and `OwnCertificateError` for a certificate that is not this daemon's or
    cannot be used.
    """
    files = settings.tls.files
    if files is None:
        _require_protection(settings)
        return None
    node = Node(files)
    identity = node.identity
    if identity.role != role:
        raise OwnCertificateError(
            f"{files.certificate} is the certificate of {identity}, but this is a {called(role)}: name the folder of this node"
            " with tls.folder"
        )
    if identity.name != settings.name:
        raise OwnCertificateError(
            f"{files.certificate} is the certificate of {identity}, but this daemon's name is '{settings.name}': name the folder"
            f' of this node with tls.folder, or set name = "{identity.name}"'
        )
    _warn_of_names(settings, node)
    return node


def guard_of(settings: FedSettings | EdgeSettings, node: Node | None, serves: Serves = lambda device, edge: None) -> Guard:
    """What stands before the services of a server. Raises `OwnCertificateError` for a list of revoked certificates that cannot be
    used."""
    from sfl.identity.revoked import Revocations
    from sfl.wire.guard import Guard

    revoked = None if node is None else Revocations(node.files.revoked, node.files.ca)
    return Guard(settings.limits, revoked, serves)


def _require_protection(settings: DaemonSettings) -> None:
    used = {name: getattr(settings, name) for name in _ADDRESSES if hasattr(settings, name)}
    outside = [f"{name} = {address}" for name, address in used.items() if not is_loopback(address)]
    if not outside:
        return
    if not settings.tls.plaintext:
        raise PlaintextError(
            f"nothing protects what passes between machines at {' and '.join(outside)}: make certificates with `sfl certs make`,"
            " copy this node's folder here and name it with tls.folder. Or set tls.plaintext = true, which lets anyone on the way"
            " read and change activations, labels and adapters, and anyone take part"
        )
    log.warning(
        "%s without TLS (tls.plaintext): anyone on the way can read and change activations, labels and adapters",
        " and ".join(outside),
    )


def _warn_of_names(settings: DaemonSettings, node: Node) -> None:
    """Those who dial the address that this daemon listens on will look for it in the certificate."""
    address = getattr(settings, "listen", None)
    if address is None:
        return
    host = check_address(address)[0]
    if host not in _ANY and not is_loopback(address) and host.strip("[]") not in node.shown().hosts:
        log.warning(
            "the certificate of %s is not for '%s', on which it listens, but for %s: who dials that will refuse it; add it with"
            " `sfl certs renew %s=%s`",
            node.identity,
            host,
            ", ".join(node.shown().hosts),
            node.identity.name,
            host,
        )
