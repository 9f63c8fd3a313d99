"""Makes certificates: an authority's own, those that it gives to nodes, and the list of those that it has revoked.

Keys are ECDSA on P-256. What a certificate is for is written into it: devices and operators can only dial, servers can be
dialled at the addresses that are in theirs.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sfl.identity.identity import SERVERS, Identity

AUTHORITY_DAYS, NODE_DAYS = 3650.0, 365.0
_EARLIER = timedelta(hours=1)  # before now that certificates are valid from, for nodes whose clock is behind
_LONGEST_NAME = 64  # of a certificate's subject; the whole name is in the URI


class Authority:
    """A key that certificates are signed with, and the certificate that they are checked against."""

    def __init__(self, key: ec.EllipticCurvePrivateKey, certificate: x509.Certificate) -> None:
        self.key = key
        self.certificate = certificate

    @classmethod
    def new(cls, days: float = AUTHORITY_DAYS) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        name = _name(f"sfl authority {identifier.digest.hex()[:8]}")  # no two have one name, or errors would mislead
        builder = _builder(name, name, key, days).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(signs_certificates=True), critical=True).add_extension(identifier, critical=False)
        return cls(key, builder.sign(key, hashes.SHA256()))

    def issue(
        self, identity: Identity, hosts: Sequence[str] = (), days: float = NODE_DAYS
    ) -> tuple[ec.EllipticCurvePrivateKey, x509.Certificate]:
        """A new key, and its certificate for a node with addresses `hosts` (names or IP addresses), valid for `days`.

        It ends with the authority's own at the latest.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if identity.role in SERVERS:
            usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
        names = [x509.UniformResourceIdentifier(identity.uri), *map(_general_name, hosts)]
        latest = self.certificate.not_valid_after_utc
        builder = _builder(_name(identity.name[:_LONGEST_NAME]), self.certificate.subject, key, days, latest)
        for extension, critical in (
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs_certificates=False), True),
            (x509.ExtendedKeyUsage(usages), False),
            (x509.SubjectAlternativeName(names), False),
            (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False),
        ):
            builder = builder.add_extension(extension, critical)
        return key, builder.sign(self.key, hashes.SHA256())

    def revocation_list(self, number: int, revoked: Iterable[tuple[int, datetime]]) -> x509.CertificateRevocationList:
        """The list of these serial numbers, with the time at which each was revoked; its own number grows from one list to the
        next. It is valid as long as the authority: how old a node's copy is, nobody can tell."""
        now = datetime.now(timezone.utc)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(now - _EARLIER)
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), critical=False)
            .add_extension(x509.CRLNumber(number), critical=False)
        )
        for serial, at in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(at).build()
            builder = builder.add_revoked_certificate(entry)
        return builder.sign(self.key, hashes.SHA256())


def is_ip(host: str) -> bool:
    """Whether a host is an IP address and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def pem_of(what: x509.Certificate | x509.CertificateRevocationList | ec.EllipticCurvePrivateKey) -> bytes:
    if isinstance(what, ec.EllipticCurvePrivateKey):
        form, encryption = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        return what.private_bytes(serialization.Encoding.PEM, form, encryption)
    return what.public_bytes(serialization.Encoding.PEM)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float, latest: datetime | None = None
) -> x509.CertificateBuilder:
    now = datetime.now(timezone.utc)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(min(now, end) - _EARLIER)
        .not_valid_after(min(end, latest or end))
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _general_name(host: str) -> x509.GeneralName:
    return x509.IPAddress(ipaddress.ip_address(host)) if is_ip(host) else x509.DNSName(host)


def _usage(signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
