"""What commands that ask a running server have in common: who they are, and settings without a daemon's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TypeVar

from pydantic import Field

from sfl.base_settings import Settings
from sfl.cli.load_settings import load, split_options
from sfl.cli.names import settings_of, variable_of
from sfl.connection_settings import TlsSettings
from sfl.errors import PlaintextError, UnreachableError
from sfl.identity.node import Node
from sfl.wire.address import connect, is_loopback


class AskingSettings(Settings):
    """How to ask."""

    wait_s: float = Field(5.0, gt=0, description="seconds to wait for an answer")
    tls: TlsSettings = Field(default_factory=TlsSettings, description="the certificate that is shown to the server")


_PROBE_S = 1.0  # for an answer to a first look, which a machine without such a server gives at once

Asking = TypeVar("Asking", bound=AskingSettings)


def asked(model: type[Asking], arguments: Sequence[str], prog: str) -> Asking:
    """Settings from a file, the environment and `arguments`; variables that are a daemon's, as in a container, do not matter."""
    options = split_options(arguments)
    known = {variable_of(name) for name in settings_of(model)}
    environment = {name: value for name, value in os.environ.items() if name.upper() in known}
    return load(model, options.config, options.rest, environment=environment, prog=prog)


def own_node(tls: TlsSettings, address: str) -> Node | None:
    """Who asks; None without TLS. Raises `PlaintextError` for an address outside this machine, as `OwnCertificateError` for a
    certificate that cannot be used."""
    if tls.files is not None:
        return Node(tls.files)
    if not (tls.plaintext or is_loopback(address)):
        raise PlaintextError(
            f"{address} is not on this machine, and nothing protects what is asked there: name a node's folder with --tls.folder,"
            " or say --tls.plaintext where the server goes without"
        )
    return None


def require_listening(address: str, peer: str, wait_s: float) -> None:
    """Raise `UnreachableError` at once where nobody listens: a daemon waits for its server to start, whoever asks does not.

    Where nothing answers, nothing is raised: that is `dial`'s to wait for.
    """
    try:
        connect(address, min(_PROBE_S, wait_s)).close()
    except ConnectionRefusedError as error:
        raise UnreachableError(f"nobody listens at {address}: is {peer} running, and is the address right?") from error
    except OSError:
        return
