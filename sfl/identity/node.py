"""This node's own certificate: read from its files, and checked by showing it to itself.

Only the standard library is used: a device has nothing to spare for a package that makes certificates.
"""

from __future__ import annotations

import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfl.errors import CertificateTimeError, OwnCertificateError
from sfl.identity.identity import Identity
from sfl.telemetry import log

CA, CERTIFICATE, KEY, REVOKED = "ca.pem", "node.pem", "key.pem", "revoked.crl"  # names in a node's folder
_SOON_S = 30 * 86400  # before its end that a certificate is said to end
_NEW = "a new one comes from the authority: `sfl certs renew NAME`, and then its folder is copied to the node"

# OpenSSL's codes of what is wrong with a certificate that it was shown.
_WRONG = {
    3: "the list of revoked certificates is not that of this authority: copy ca.pem and revoked.crl of one `sfl certs make`",
    8: "the list of revoked certificates is not signed by this authority: copy ca.pem and revoked.crl of one `sfl certs make`",
    9: "it is not valid yet: is this machine's clock right?",
    10: f"it has expired ({_NEW}; or is this machine's clock wrong?)",
    11: "the list of revoked certificates is not valid yet: is this machine's clock right?",
    12: "the list of revoked certificates has expired: copy revoked.crl from the authority again",
    23: "it is revoked: only a new one from the authority helps (`sfl certs add`)",
    26: "it is not made for this end of a connection: nobody can serve with a device's, and others are not of `sfl certs`",
}
_NOT_NOW = {9, 10, 11, 12}
_OTHER_AUTHORITY = {7, 18, 19, 20, 21}


@dataclass(frozen=True)
class NodeFiles:
    """Where a node's certificate is, all in PEM: of the authority, its own, its key, and the list of revoked ones."""

    ca: Path
    certificate: Path
    key: Path
    revoked: Path

    @classmethod
    def within(cls, folder: Path) -> NodeFiles:
        """As `sfl certs` lays them out."""
        return cls(folder / CA, folder / CERTIFICATE, folder / KEY, folder / REVOKED)

    def stamp(self) -> tuple[tuple[int, int, int], ...]:
        """Changes when one of the files of this node's own certificate does. Raises `OSError` when one is missing."""
        states = (path.stat() for path in (self.ca, self.certificate, self.key))
        return tuple((state.st_ino, state.st_size, state.st_mtime_ns) for state in states)


@dataclass(frozen=True)
class Shown:
    """What a node's files hold, checked against each other."""

    identity: Identity
    hosts: tuple[str, ...]  # at which others may dial it
    until: float  # Unix time
    ca: bytes
    certificate: bytes
    key: bytes


class Node:
    """Who this process is. Its files are read again when they have changed: new connections show a renewed certificate.

    Raises `OwnCertificateError` naming the file, what is wrong with it and what to do; `CertificateTimeError` where that is
    nothing but the time.
    """

    def __init__(self, files: NodeFiles) -> None:
        self.files = files
        self._lock = threading.Lock()
        self._stamp = self._look()
        self._shown = _read(files)
        left = self._shown.until - time.time()
        if left < _SOON_S:
            log.warning(
                "the certificate of %s expires in %.0f days: renew it with `sfl certs renew`", self.identity, left / 86400
            )
        if files.key.stat().st_mode & 0o077:
            log.warning("%s can be read by others on this machine: chmod 600 it", files.key)

    @property
    def identity(self) -> Identity:
        return self._shown.identity

    def shown(self) -> Shown:
        """What is to be shown to others now. Files that have changed and are wrong, or not all there yet, are left aside."""
        with self._lock:
            try:
                stamp = self._look()
                if stamp == self._stamp:
                    return self._shown
                self._stamp, fresh = stamp, _read(self.files)
                if fresh.identity != self._shown.identity:
                    raise OwnCertificateError(f"{self.files.certificate} is now that of {fresh.identity}")
                self._shown = fresh
                log.info("the certificate of %s was renewed", self.identity)
            except (OwnCertificateError, OSError) as error:
                log.error("the renewed certificate is not used: %s", error)
            return self._shown

    def context(self) -> ssl.SSLContext:
        """For dialling by hand, as gRPC would: this node's certificate is shown, and a server's is checked, also against the
        list of revoked ones."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        _trust(context, self.files)
        _show(context, self.files)
        context.set_alpn_protocols(["h2"])
        return context

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        try:
            return self.files.stamp()
        except OSError as error:
            raise _missing(Path(error.filename), error) from error


def explained(code: int) -> str | None:
    """What is wrong with a certificate, by OpenSSL's code; None for what is not told apart."""
    return "it was given out by another authority than the one of ca.pem" if code in _OTHER_AUTHORITY else _WRONG.get(code)


def _read(files: NodeFiles) -> Shown:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    server.verify_mode = ssl.CERT_REQUIRED
    _trust(server, files)
    for context in (server, client):
        _show(context, files)
    try:
        shown = _handshake(server, client)
    except ssl.SSLCertVerificationError as error:
        reason = explained(error.verify_code) or error.verify_message
        kind = CertificateTimeError if error.verify_code in _NOT_NOW else OwnCertificateError
        raise kind(f"the certificate {files.certificate} cannot be used: {reason}") from error
    except ssl.SSLError as error:
        raise OwnCertificateError(f"the certificate {files.certificate} cannot be used: {error.reason or error}") from error
    names: tuple[tuple[str, str], ...] = shown.get("subjectAltName", ())
    identity = next((Identity.from_uri(value) for kind, value in names if kind == "URI"), None)
    if identity is None:
        raise OwnCertificateError(
            f"the certificate {files.certificate} does not say which node it is for: use one of `sfl certs`"
        )
    hosts = tuple(value for kind, value in names if kind in ("DNS", "IP Address"))
    until = ssl.cert_time_to_seconds(shown["notAfter"])
    return Shown(identity, hosts, until, *(path.read_bytes() for path in (files.ca, files.certificate, files.key)))


def _trust(context: ssl.SSLContext, files: NodeFiles) -> None:
    """Have `context` ask its peers for a certificate of this authority that is not revoked."""
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags |= ssl.VerifyFlags.VERIFY_CRL_CHECK_LEAF
    for path, what in ((files.ca, "certificate"), (files.revoked, "list of revoked certificates")):
        try:
            context.load_verify_locations(path)
        except ssl.SSLError as error:
            raise OwnCertificateError(f"{path} holds no {what} in PEM: copy it from the authority again") from error
        except OSError as error:
            raise _missing(path, error) from error


def _show(context: ssl.SSLContext, files: NodeFiles) -> None:
    def no_password() -> str:  # or OpenSSL asks the terminal
        raise OwnCertificateError(f"{files.key} is protected by a password: daemons cannot type one, use the key without it")

    for path in (files.certificate, files.key):
        try:
            path.open("rb").close()
        except OSError as error:
            raise _missing(path, error) from error
    try:
        context.load_cert_chain(files.certificate, files.key, no_password)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise OwnCertificateError(
                f"{files.key} is not the key of the certificate {files.certificate}: copy both from one node's folder"
            ) from error
        raise OwnCertificateError(f"{files.certificate} or {files.key} is damaged, or not in PEM: copy them again") from error


def _handshake(server: ssl.SSLContext, client: ssl.SSLContext) -> dict[str, Any]:
    """The client's certificate as the server sees it once it has checked it. Nothing leaves this process."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [client.wrap_bio(down, up), server.wrap_bio(up, down, server_side=True)]
    while waiting := [end for end in ends if not _done(end)]:
        if not (up.pending or down.pending):
            raise ssl.SSLError(f"{len(waiting)} ends wait for each other")
    return ends[1].getpeercert() or {}


def _done(end: ssl.SSLObject) -> bool:
    try:
        end.do_handshake()
    except ssl.SSLWantReadError:
        return False
    return True


def _missing(path: Path, error: OSError) -> OwnCertificateError:
    if isinstance(error, FileNotFoundError):
        return OwnCertificateError(
            f"there is no {path}: copy this node's whole folder ({CA}, {CERTIFICATE}, {KEY}, {REVOKED}) from the machine where"
            " `sfl certs` made it, and name it with tls.folder"
        )
    return OwnCertificateError(f"{path} cannot be read: {error.strerror or error}")
