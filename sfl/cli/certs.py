"""`sfl certs`: an authority, and certificates for all nodes."""

from __future__ import annotations

from collections.abc import Sequence
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sfl.errors import SettingsError
from sfl.identity.identity import Identity, Role

if TYPE_CHECKING:
    from sfl.identity.folder import Issued, Wanted

_EXAMPLE = "NAME=HOST[,HOST...]"
_DAYS = 365.0

app = typer.Typer(no_args_is_help=True, help="Make, renew and revoke the certificates by which nodes know each other.")

Out = Annotated[Path, typer.Option(help="folder of the authority and of what it issues")]
Days = Annotated[float, typer.Option(min=0.01, help="days that nodes' certificates are valid")]
Feds = Annotated[list[str] | None, typer.Option("--fed", metavar=_EXAMPLE, help="a federation server, with all its addresses")]
Edges = Annotated[list[str] | None, typer.Option("--edge", metavar=_EXAMPLE, help="an edge server, with all its addresses")]
Devices = Annotated[list[str] | None, typer.Option("--device", metavar="NAME", help="a device")]
Operators = Annotated[list[str] | None, typer.Option("--operator", metavar="NAME", help="someone who may look at the status")]


@app.command()
def make(
    out: Out = Path("certs"),
    fed: Feds = None,
    edge: Edges = None,
    device: Devices = None,
    operator: Operators = None,
    days: Days = _DAYS,
    authority_days: Annotated[float, typer.Option(min=0.01, help="days that the authority is valid")] = 3650.0,
) -> None:
    """Make an authority, and a folder for each node to copy there."""
    from sfl.identity.folder import CertificateFolder

    wanted = _wanted(fed, edge, device, operator)
    CertificateFolder.make(out, wanted, authority_days, days)
    _say_where(out, [each.identity.name for each in wanted])
    typer.echo(f"{out / 'authority'} signs certificates: keep it here, or offline, and copy it to no node")


@app.command()
def add(
    out: Out = Path("certs"),
    fed: Feds = None,
    edge: Edges = None,
    device: Devices = None,
    operator: Operators = None,
    days: Days = _DAYS,
) -> None:
    """Make certificates for further nodes."""
    from sfl.identity.folder import CertificateFolder

    wanted = _wanted(fed, edge, device, operator)
    if not wanted:
        raise SettingsError("say for whom: --fed, --edge, --device or --operator")
    CertificateFolder.open(out).add(wanted, days)
    _say_where(out, [each.identity.name for each in wanted])


@app.command()
def renew(
    names: Annotated[list[str], typer.Argument(metavar="NAME[=HOST,...]...", help="nodes, and other addresses for a server")],
    out: Out = Path("certs"),
    days: Days = _DAYS,
) -> None:
    """Make a new key and certificate for nodes; the earlier ones stay valid until they end."""
    from sfl.identity.folder import CertificateFolder

    folder = CertificateFolder.open(out)
    given = [_split(name) for name in names]
    for name, hosts in given:
        folder.renew(name, hosts, days)
    _say_where(out, [name for name, _ in given])
    typer.echo("running daemons show them from their next connection on, once they are in their folder")


@app.command()
def revoke(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="nodes that are to get nothing any more")],
    out: Out = Path("certs"),
) -> None:
    """Revoke all certificates of nodes."""
    from sfl.identity.folder import CertificateFolder

    folder = CertificateFolder.open(out)
    for name in names:
        revoked = folder.revoke(name)
        typer.echo(f"{name}: {len(revoked)} revoked" if revoked else f"{name}: was revoked before")
    typer.echo(
        f"copy {out / 'authority' / 'revoked.crl'} to the federation server and every edge server, in place of theirs: they read"
        " it at once, without a restart"
    )


@app.command("list")
def show(
    out: Out = Path("certs"), json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False
) -> None:
    """Show all certificates that were issued."""
    from sfl.identity.folder import CertificateFolder

    issued = CertificateFolder.open(out).issued()
    if json:
        typer.echo(dumps([_plain(each) for each in issued], indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("node", "role", "addresses", "valid until", "state", box=None)
    for each in issued:
        until = f"{each.until:%Y-%m-%d %H:%M} UTC"
        table.add_row(each.identity.name, each.identity.role, "\n".join(each.hosts), until, each.state)
    Console().print(table, highlight=False)


def _plain(issued: Issued) -> dict[str, object]:
    return {
        "name": issued.identity.name,
        "role": issued.identity.role,
        "hosts": issued.hosts,
        "serial": f"{issued.serial:x}",
        "until": issued.until.isoformat(),
        "state": issued.state,
    }


def _wanted(
    feds: Sequence[str] | None, edges: Sequence[str] | None, devices: Sequence[str] | None, operators: Sequence[str] | None
) -> list[Wanted]:
    from sfl.identity.folder import Wanted

    roles: dict[Role, Sequence[str] | None] = {"fed": feds, "edge": edges, "device": devices, "operator": operators}
    found = []
    for role, given in roles.items():
        for text in given or ():
            name, hosts = _split(text)
            found.append(Wanted(Identity(role, name), hosts))
    return found


def _split(text: str) -> tuple[str, tuple[str, ...]]:
    """`NAME=HOST,HOST` in its parts."""
    name, equals, hosts = text.partition("=")
    if equals and not hosts.strip():
        raise SettingsError(f"'{text}' names no address after the equals sign: {_EXAMPLE}")
    return name, tuple(host.strip() for host in hosts.split(",")) if equals else ()


def _say_where(out: Path, names: Sequence[str]) -> None:
    for name in names:
        typer.echo(f"{out / 'nodes' / name}: copy this folder to {name}, and name it there with tls.folder")
