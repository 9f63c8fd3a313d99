"""The list of revoked certificates, as a server follows it."""

from __future__ import annotations

from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from sfl.errors import OwnCertificateError
from sfl.telemetry import log


class Revocations:
    """Serial numbers of revoked certificates, read again when the file has changed.

    A new list that is damaged, missing, not the authority's or older than the one before is logged and left aside: who was
    revoked stays so. Raises `OwnCertificateError` where the first one cannot be read.
    """

    def __init__(self, path: Path, ca: Path) -> None:
        self._path = path
        self._ca = ca
        self._stamp = self._look()
        self._numbers: dict[x509.Name, int] = {}  # of the newest list of each authority; they grow from one to the next
        self._serials = self._read()

    def __contains__(self, serial: int) -> bool:
        return serial in self._serials

    def refresh(self) -> bool:
        """Whether there is a new list."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            self._serials = self._read()
        except OwnCertificateError as error:
            log.error("the new list of revoked certificates is not used: %s", error)
            return False
        log.info("%s: revoked certificates: %d", self._path, len(self._serials))
        return True

    def _look(self) -> tuple[int, int, int] | None:
        try:
            state = self._path.stat()
        except OSError:
            return None
        return state.st_ino, state.st_size, state.st_mtime_ns

    def _read(self) -> frozenset[int]:
        try:
            listed = x509.load_pem_x509_crl(self._path.read_bytes())
            authority = x509.load_pem_x509_certificate(self._ca.read_bytes())
            if not listed.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]  # other kinds of key raise
                raise OwnCertificateError(f"{self._path} is not signed by the authority of {self._ca}")
            number = listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            if number < self._numbers.get(listed.issuer, 0):
                raise OwnCertificateError(f"{self._path} is older than the list in use: copy the newest from the authority")
            self._numbers[listed.issuer] = number
            return frozenset(entry.serial_number for entry in listed)
        except OSError as error:
            raise OwnCertificateError(f"{error.filename} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.ExtensionNotFound) as error:
            raise OwnCertificateError(f"{self._path} or {self._ca} is damaged: {error}") from error
