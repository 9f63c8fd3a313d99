"""`sfl health`: whether a server serves, for those who keep containers running."""

from __future__ import annotations

import urllib.error
import urllib.request

import typer
from pydantic import Field

from sfl.cli.asking import AskingSettings, asked, own_node, require_listening
from sfl.errors import MissingPackageError, RefusedError, SettingsError, UnreachableError

_HELP = """usage: sfl health ADDRESS [--service NAME] [--wait-s S] [--tls.folder DIR]

Ask a server at HOST:PORT by gRPC's health protocol whether it serves, or a daemon at http://HOST:PORT/healthz, where a
device answers on its metrics_listen. Exit code 0 if it does.

  --service NAME     one service, such as sfl.v1.SplitTraining; left out: the server as a whole
  --wait-s S         seconds to wait for an answer (default: 5); a port at which nobody listens is said at once, also that of a
                     server that is starting
  --tls.folder DIR   the node's folder whose certificate is shown; see also SFL_TLS__FOLDER"""


class HealthSettings(AskingSettings):
    """What is asked."""

    service: str = Field("", description="one service; left out: the server as a whole")


def health(context: typer.Context) -> None:
    """Ask whether a daemon serves, by exit code; sfl health --help says more."""
    arguments = list(context.args)
    if "--help" in arguments or not arguments or arguments[0].startswith("-"):
        typer.echo(_HELP)
        raise typer.Exit(0 if "--help" in arguments else 2)
    address, *rest = arguments
    settings = asked(HealthSettings, rest, "sfl health")
    if "://" in address:
        typer.echo(_over_http(address, settings.wait_s), nl=False)
        return
    try:
        from sfl.watching.health import require_serving
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "asking by gRPC needs grpcio-health-checking, which is not installed, as a device does without: ask on the server's"
            " own machine, or a daemon at http://HOST:PORT/healthz, where its metrics_listen is; or pip install it"
        ) from error
    from sfl.wire.channel import dial

    peer = "the server"
    node = own_node(settings.tls, address)
    require_listening(address, peer, settings.wait_s)
    channel = dial(address, peer, settings.wait_s, node)
    try:
        require_serving(channel, f"{peer} at {address}", settings.service, settings.wait_s)
    finally:
        channel.close()
    typer.echo("serving")


def _over_http(url: str, wait_s: float) -> str:
    """What a page of health says. Raises `RefusedError` where it says that the daemon is not healthy (yet)."""
    if not url.startswith("http://"):
        raise SettingsError(f"'{url}' is no address: expected HOST:PORT, or http://HOST:PORT/healthz")
    try:
        with urllib.request.urlopen(url, timeout=wait_s) as answer:
            text: str = answer.read(65536).decode("utf-8", "replace")
            return text
    except urllib.error.HTTPError as error:
        raise RefusedError(f"{url} says {error.code}: {error.read(1000).decode('utf-8', 'replace').strip()}") from error
    except OSError as error:
        raise UnreachableError(f"{url} did not answer: {getattr(error, 'reason', error)}") from error
