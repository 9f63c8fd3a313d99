"""Settings of connections: how they are protected, and what one node may take of a server."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from sfl.base_settings import Settings
from sfl.identity.node import NodeFiles


class TlsSettings(Settings):
    """This node's certificate. On loopback a daemon may do without; elsewhere it needs one, or `plaintext`."""

    folder: Path | None = Field(
        None, description="this node's folder as `sfl certs` makes it, with ca.pem, node.pem, key.pem and revoked.crl"
    )
    ca: Path | None = Field(None, description="the authority's certificate; left out: ca.pem in tls.folder")
    certificate: Path | None = Field(None, description="this node's certificate; left out: node.pem in tls.folder")
    key: Path | None = Field(None, description="the certificate's key; left out: key.pem in tls.folder")
    revoked: Path | None = Field(None, description="list of revoked certificates; left out: revoked.crl in tls.folder")
    plaintext: bool = Field(
        False, description="go without: anyone on the way may read and change activations, labels and adapters"
    )

    @model_validator(mode="after")
    def _check(self) -> TlsSettings:
        single = {"ca": self.ca, "certificate": self.certificate, "key": self.key, "revoked": self.revoked}
        given = ["tls.folder"] * (self.folder is not None) + [f"tls.{name}" for name, path in single.items() if path is not None]
        missing = [f"tls.{name}" for name, path in single.items() if path is None]
        if self.plaintext and given:
            raise ValueError(
                f"tls.plaintext = true goes without a certificate, but {' and '.join(given)} name one: remove either"
            )
        if given and self.folder is None and missing:
            raise ValueError(f"{' and '.join(given)} without {' and '.join(missing)}: give all four, or tls.folder")
        return self

    @property
    def files(self) -> NodeFiles | None:
        """Where this node's certificate is; None without TLS."""
        folder = NodeFiles.within(self.folder or Path())
        files = NodeFiles(
            self.ca or folder.ca, self.certificate or folder.certificate, self.key or folder.key, self.revoked or folder.revoked
        )
        return None if self.folder is None and self.certificate is None else files


class LimitSettings(Settings):
    """What one node may take of a server; whoever asks for more is refused, and the others go on. MB are 10**6 bytes.

    A server needs memory for what is in flight of a node or two beside its own: less of it, lower limits.
    """

    streams: int = Field(64, ge=1, description="calls that one node may have open at a time")
    in_flight_mb: float = Field(
        512.0, gt=0, description="MB of unfinished requests that one node may have at a time; what comes above that waits"
    )
    request_mb: float = Field(256.0, gt=0, description="at an edge server: largest batch of a device in MB")
    adapter_mb: float = Field(512.0, gt=0, description="at the federation server: largest adapter that becomes version 0 in MB")
    sessions: int = Field(256, ge=1, description="at an edge server: devices that may have a session at a time")
    opening_s: float = Field(30.0, gt=0, description="seconds in which the first message of a call must come")
    stalled_s: float = Field(
        120.0, gt=0, description="seconds in which the next piece, of at most 0.5 MB, of a message that has begun must come"
    )
    connections: int = Field(4_096, ge=1, description="connections that a server takes at a time, of all nodes together")

    @model_validator(mode="after")
    def _check(self) -> LimitSettings:
        for name, size in (("request_mb", self.request_mb), ("adapter_mb", self.adapter_mb)):
            if size > self.in_flight_mb:
                raise ValueError(f"limits.{name} = {size:g} is above limits.in_flight_mb = {self.in_flight_mb:g}: raise that too")
        return self
