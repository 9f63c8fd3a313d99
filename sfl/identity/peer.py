"""Who calls, by the certificate that the call's connection was made with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from cryptography import x509

from sfl.identity.identity import Identity


@dataclass(frozen=True)
class Peer:
    """What the certificate says, which the handshake has checked: an identity, or None for one that sfl did not make."""

    identity: Identity | None
    serial: int
    until: float  # Unix time


def peer_of(auth_context: Mapping[str, Iterable[bytes]]) -> Peer | None:
    """The peer of a call; None where there is no TLS."""
    shown = list(auth_context.get("x509_pem_cert", ()))
    return _peer(bytes(shown[0])) if shown else None


@lru_cache(maxsize=1024)
def _peer(pem: bytes) -> Peer:
    certificate = x509.load_pem_x509_certificate(pem)
    uris: list[str] = []
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except (x509.ExtensionNotFound, ValueError):  # the latter for extensions that cannot be read
        pass
    identity = Identity.from_uri(uris[0]) if len(uris) == 1 else None
    return Peer(identity, certificate.serial_number, certificate.not_valid_after_utc.timestamp())
