"""The folder that an authority lives in, with a folder inside for each node to copy.

    authority/key.pem  ca.pem  revoked.crl  issued/NAME.SERIAL.pem      stays where it was made
    nodes/NAME/ca.pem  node.pem  key.pem  revoked.crl                  goes to the node

The certificates themselves are the book of what was issued, and the revocation list that of what was revoked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from sfl.disk import replace_file, sync
from sfl.errors import SettingsError
from sfl.identity.authority import AUTHORITY_DAYS, NODE_DAYS, Authority, is_ip, pem_of
from sfl.identity.identity import SERVERS, Identity, called
from sfl.identity.node import CA, CERTIFICATE, KEY, REVOKED

State = Literal["valid", "replaced", "revoked", "expired"]

_LOOPBACK = ("localhost", "127.0.0.1", "::1")  # so that a server's own machine can ask it how it is
_HOST = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9_-]{1,63}(?<!-))*")
_LONGEST_NAME = 100  # of a node, whose name is part of file names


@dataclass(frozen=True)
class Wanted:
    """A node that is to have a certificate, with the addresses under which others dial it."""

    identity: Identity
    hosts: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `SettingsError` for a name that cannot be a folder's, an address that is none, or a server without one."""
        name, role = self.identity.name, self.identity.role
        if not name.strip() or name in (".", "..") or any(each in "/\\=," or not each.isprintable() for each in name):
            raise SettingsError(f"'{name}' is no name for a node: it may hold no slash, backslash, comma or equals sign")
        if len(name.encode()) > _LONGEST_NAME:
            raise SettingsError(f"the name '{name}' is longer than {_LONGEST_NAME} bytes")
        for host in self.hosts:
            if not is_ip(host) and not _is_host_name(host):
                raise SettingsError(f"'{host}' of {self.identity} is no host: give names or IP addresses without a port")
        if role in SERVERS and not self.hosts:
            raise SettingsError(
                f"{self.identity} has no address: say where others find it, as in --{role} {name}=10.0.0.1,{name}.lan"
            )
        if role not in SERVERS and self.hosts:
            raise SettingsError(
                f"{self.identity} has addresses, but nobody dials a {called(role)}: leave out ={','.join(self.hosts)}"
            )

    def all_hosts(self) -> tuple[str, ...]:
        """With loopback, and with a server's own name, which is its host name in a container."""
        if self.identity.role not in SERVERS:
            return ()
        own = (self.identity.name,) if _is_host_name(self.identity.name) else ()
        return tuple(dict.fromkeys((*self.hosts, *own, *_LOOPBACK)))


@dataclass(frozen=True)
class Issued:
    """A certificate that was given to a node."""

    identity: Identity
    hosts: tuple[str, ...]
    serial: int
    since: datetime
    until: datetime
    state: State


class CertificateFolder:
    """An authority with all that it has issued. Every method that reads raises `SettingsError` for files that are damaged."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        self._folder = folder
        self._authority = authority

    @classmethod
    def make(
        cls, folder: Path, wanted: Sequence[Wanted], authority_days: float = AUTHORITY_DAYS, days: float = NODE_DAYS
    ) -> CertificateFolder:
        """Begin with a new authority and its first nodes. Raises `SettingsError` where there is an authority, before anything is
        written; what was broken off is begun anew."""
        if (folder / "authority" / CA).exists():
            raise SettingsError(f"{folder} holds an authority already: add nodes with `sfl certs add`, or choose another --out")
        _require_together(wanted)
        made = cls(folder, Authority.new(authority_days))
        for broken_off in _private_folder(folder / "authority" / "issued").iterdir():
            broken_off.unlink()
        _private_folder(folder / "nodes")
        made._publish(1, ())
        write_private(folder / "authority" / KEY, pem_of(made._authority.key))
        for each in wanted:
            made._issue(each, days)
        write_private(folder / "authority" / CA, pem_of(made._authority.certificate))  # last: from now on it is one
        return made

    @classmethod
    def open(cls, folder: Path) -> CertificateFolder:
        key = serialization.load_pem_private_key(_read(folder / "authority" / KEY, folder), None)
        certificate = x509.load_pem_x509_certificate(_read(folder / "authority" / CA, folder))
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise SettingsError(f"{folder / 'authority' / KEY} is not the key of the {CA} beside it")
        return cls(folder, Authority(key, certificate))

    def add(self, wanted: Sequence[Wanted], days: float = NODE_DAYS) -> None:
        """Give nodes a key and a certificate. Raises `SettingsError` for a name that is in use, before anything is written."""
        _require_together(wanted)
        in_use = {issued.identity.name: issued.identity for issued in self.issued() if issued.state == "valid"}
        for each in wanted:
            if (name := each.identity.name) in in_use:
                raise SettingsError(
                    f"the name '{name}' is that of {in_use[name]}: choose another, `sfl certs renew {name}` for a new"
                    f" certificate, or `sfl certs revoke {name}` first"
                )
        for each in wanted:
            self._issue(each, days)

    def renew(self, name: str, hosts: tuple[str, ...] = (), days: float = NODE_DAYS) -> Path:
        """A new key and certificate for a node, with other addresses where any are given; the earlier one stays valid."""
        known = [issued for issued in self.issued() if issued.identity.name == name]
        if not known:
            raise SettingsError(f"there is no node '{name}' in {self._folder}: `sfl certs list` shows them")
        if known[-1].state == "revoked":
            raise SettingsError(f"the certificate of {known[-1].identity} is revoked: make a new one with `sfl certs add`")
        wanted = Wanted(known[-1].identity, hosts or known[-1].hosts)
        wanted.check()
        return self._issue(wanted, days)

    def revoke(self, name: str) -> list[Issued]:
        """Revoke all certificates of a node; those that were not revoked before. All nodes' folders get the new list."""
        known = [issued for issued in self.issued() if issued.identity.name == name]
        if not known:
            raise SettingsError(f"there is no node '{name}' in {self._folder}: `sfl certs list` shows them")
        fresh = [issued for issued in known if issued.state != "revoked"]
        now = datetime.now(timezone.utc)
        number = self._list().extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
        self._publish(number + 1, [*self._revoked().items(), *((issued.serial, now) for issued in fresh)])
        return fresh

    def issued(self) -> list[Issued]:
        """All certificates, by name, those of one name from the oldest to the newest."""
        revoked, now = self._revoked(), datetime.now(timezone.utc)
        files = sorted((self._folder / "authority" / "issued").glob("*.pem"), key=lambda path: path.stat().st_mtime_ns)
        found = [_issued(x509.load_pem_x509_certificate(path.read_bytes()), revoked, now) for path in files]
        found.sort(key=lambda issued: (issued.identity.name, issued.since))
        later = [(each.identity.name, each.state) for each in found[1:]]
        return [
            replace(each, state="replaced") if each.state == "valid" and follows == (each.identity.name, "valid") else each
            for each, follows in zip(found, [*later, ("", "")])
        ]

    def _issue(self, wanted: Wanted, days: float) -> Path:
        key, certificate = self._authority.issue(wanted.identity, wanted.all_hosts(), days)
        name = wanted.identity.name
        write_private(self._folder / "authority" / "issued" / f"{name}.{certificate.serial_number:x}.pem", pem_of(certificate))
        folder = _private_folder(self._folder / "nodes" / name)
        write_private(folder / CA, pem_of(self._authority.certificate))
        write_private(folder / REVOKED, _read(self._folder / "authority" / REVOKED, self._folder))
        write_private(folder / KEY, pem_of(key))
        write_private(folder / CERTIFICATE, pem_of(certificate))
        return folder

    def _list(self) -> x509.CertificateRevocationList:
        return x509.load_pem_x509_crl(_read(self._folder / "authority" / REVOKED, self._folder))

    def _revoked(self) -> dict[int, datetime]:
        return {entry.serial_number: entry.revocation_date_utc for entry in self._list()}

    def _publish(self, number: int, revoked: Sequence[tuple[int, datetime]]) -> None:
        """Write the revocation list for the authority, and into the folder of each node."""
        content = pem_of(self._authority.revocation_list(number, revoked))
        write_private(self._folder / "authority" / REVOKED, content)
        for node in (self._folder / "nodes").iterdir():
            write_private(node / REVOKED, content)


def write_private(path: Path, content: bytes) -> None:
    """Replace a file by one that its owner alone can read."""
    replace_file(path, content, mode=0o600)


def _private_folder(path: Path) -> Path:
    """A folder that its owner alone can look into, and likewise those above it that were not there yet."""
    if not path.is_dir():
        _private_folder(path.parent)
        path.mkdir(mode=0o700)
        sync(path.parent)
    return path


def _is_host_name(host: str) -> bool:
    return len(host) <= 253 and _HOST.fullmatch(host) is not None and not host.rpartition(".")[2].isdigit()


def _require_together(wanted: Sequence[Wanted]) -> None:
    names = [each.identity.name for each in wanted]
    for each in wanted:
        each.check()
        if names.count(each.identity.name) > 1:
            raise SettingsError(f"the name '{each.identity.name}' is given twice: each node needs its own")


def _read(path: Path, folder: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise SettingsError(
            f"{folder} holds no authority ({path} is missing): make one with `sfl certs make --out {folder}`"
        ) from None


def _issued(certificate: x509.Certificate, revoked: dict[int, datetime], now: datetime) -> Issued:
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    identity = Identity.from_uri(uris[0]) if uris else None
    if identity is None:
        raise SettingsError(f"certificate {certificate.serial_number:x} in the authority's folder was not made by sfl: remove it")
    hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    state: State = "revoked" if certificate.serial_number in revoked else "valid"
    if state == "valid" and certificate.not_valid_after_utc <= now:
        state = "expired"
    return Issued(
        identity,
        tuple(hosts),
        certificate.serial_number,
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        state,
    )
