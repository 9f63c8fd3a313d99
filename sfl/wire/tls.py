"""TLS on both sides of a connection, and why one cannot be made, which gRPC keeps to itself."""

from __future__ import annotations

import ssl
from typing import Any

import grpc

from sfl.errors import PeerIdentityError
from sfl.identity.identity import Identity, Role, called
from sfl.identity.node import Node, Shown, explained
from sfl.telemetry import log
from sfl.wire.address import check_address, connect

_NAME_DIFFERS = {62, 64}  # OpenSSL's codes: the certificate is for other names, for other IP addresses
_ANSWER_S = 2.0  # for a server to say its first word after the handshake


def client_credentials(shown: Shown) -> grpc.ChannelCredentials:
    """Trusts servers of this node's authority, and shows them this node's certificate."""
    return grpc.ssl_channel_credentials(shown.ca, shown.key, shown.certificate)


def server_credentials(node: Node) -> grpc.ServerCredentials:
    """Asks every client for a certificate of this node's authority. A renewed certificate is shown on new connections."""

    def current() -> grpc.ServerCertificateConfiguration:  # asked before each handshake, in a thread of gRPC's
        shown = node.shown()
        return grpc.ssl_server_certificate_configuration([(shown.key, shown.certificate)], shown.ca)

    return grpc.dynamic_ssl_server_credentials(current(), current, require_client_authentication=True)


def check_peer(address: str, peer: str, node: Node, role: Role | None, wait_s: float) -> None:
    """Make a connection by hand to hear what is wrong with it; returns where nothing is, or nobody answers (yet).

    Raises `PeerIdentityError` when waiting will not help: the server is not the one that should be there, is revoked, or does
    not take this node's certificate.
    """
    if _shakes_hands(address, peer, node, role, wait_s):
        return
    if _shakes_hands(address, peer, node, role, wait_s):  # once more, as it might have been stopping just then
        return
    raise PeerIdentityError(
        f"{peer} at {address} does not accept the certificate of {node.identity}: it is of another authority than that server's,"
        " or not valid by that machine's clock"
    )


def require_plaintext(address: str, peer: str, wait_s: float) -> None:
    """Raise `PeerIdentityError` if the server there speaks TLS, when this node has not been told to."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        _handshake(address, context, wait_s).close()
    except OSError:
        return
    raise PeerIdentityError(
        f"{peer} at {address} wants TLS: give this node a certificate of the same authority (`sfl certs add`), and name its"
        " folder with tls.folder"
    )


def _shakes_hands(address: str, peer: str, node: Node, role: Role | None, wait_s: float) -> bool:
    """Whether nothing is wrong, or nobody is there; False where the server closes the connection after it has seen who calls."""
    try:
        connection = _handshake(address, node.context(), wait_s)
    except ssl.SSLCertVerificationError as error:
        raise PeerIdentityError(_distrusted(address, peer, error)) from error
    except ssl.SSLError as error:
        if error.reason == "WRONG_VERSION_NUMBER":
            raise PeerIdentityError(
                f"{peer} at {address} does not speak TLS: give it a certificate too (`sfl certs add`, tls.folder), or is that"
                " another server's address?"
            ) from error
        log.debug("%s at %s: %s", peer, address, error)  # it may have ended in the middle
        return True
    except OSError:
        return True
    with connection:
        _require_role(address, peer, connection, role)
        connection.settimeout(_ANSWER_S)
        try:
            return connection.recv(1) != b""  # gRPC speaks first; it looks at a client's certificate after TLS 1.3's handshake
        except TimeoutError:
            return True
        except OSError:
            return False


def _handshake(address: str, context: ssl.SSLContext, wait_s: float) -> ssl.SSLSocket:
    plain = connect(address, max(0.1, wait_s))
    try:
        return context.wrap_socket(plain, server_hostname=check_address(address)[0].strip("[]"))
    except BaseException:
        plain.close()
        raise


def _require_role(address: str, peer: str, connection: ssl.SSLSocket, role: Role | None) -> None:
    names: Any = (connection.getpeercert() or {}).get("subjectAltName", ())
    found = next((Identity.from_uri(value) for kind, value in names if kind == "URI"), None)
    if found is None:
        raise PeerIdentityError(f"{peer} at {address} has a certificate that was not made by `sfl certs`")
    if role is not None and found.role != role:
        raise PeerIdentityError(f"at {address} is {found}, and not {peer}: is a {called(role)}'s address wrong?")


def _distrusted(address: str, peer: str, error: ssl.SSLCertVerificationError) -> str:
    what = f"the certificate of {peer} at {address}"
    if error.verify_code in _NAME_DIFFERS:
        host = check_address(address)[0]
        return (
            f"{what} is not for '{host}': dial it by a name that is in it (`sfl certs list` shows them), or add this one where"
            f" certificates are made: `sfl certs renew NAME={host}`"
        )
    return f"{what} cannot be trusted: {explained(error.verify_code) or error.verify_message}"
