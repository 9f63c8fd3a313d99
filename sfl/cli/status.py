"""`sfl status`: a federation at a glance."""

from __future__ import annotations

import time
from collections.abc import Iterator
from json import dumps
from typing import TYPE_CHECKING, Any

import typer
from pydantic import Field

from sfl.cli.asking import AskingSettings, asked, own_node, require_listening
from sfl.settings import Address
from sfl.telemetry import configure_logging
from sfl.v1 import federation_pb2 as pb

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_EVERY_S = 2.0
_OF_DEVICES = (
    *("device", "state", "edge", "cut>", "step>", "version>", "loss>", "s/step>", "last step>"),
    *("sent MB>", "received MB>", "memory MB>", "updates>", "uplink MB/s>"),
)  # columns; those that end in > hold numbers
_OF_EDGES = ("edge server", "state", "lowest cut>", "devices>", "steps>", "sent MB>", "received MB>", "memory MB>")
_HELP = """usage: sfl status [--federation HOST:PORT] [--watch | --json] [--tls.folder DIR] [--config FILE]

Show a federation as the federation server knows it: its members, what they are doing, and who is behind and why.

MB are those of messages with tensors: a device's since its run began, a server's, like an edge server's steps, since its start.

  --federation HOST:PORT   where the federation server is (default: 127.0.0.1:7300)
  --watch                  show it again every 2 s, until Ctrl-C
  --json                   print one JSON object
  --wait-s S               seconds to wait for an answer (default: 5); a port at which nobody listens is said at once
  --tls.folder DIR         folder with an operator's certificate, as `sfl certs` makes it
  --config FILE            a TOML file with these settings"""


class StatusSettings(AskingSettings):
    """Whom to ask."""

    federation: Address = Field("127.0.0.1:7300", description="host:port of the federation server")


def status(context: typer.Context) -> None:
    """Show a federation: members, versions, who is slow and why; sfl status --help says more."""
    arguments = list(context.args)
    if "--help" in arguments:
        typer.echo(_HELP)
        return
    switches = {name: name in arguments for name in ("--watch", "--json")}
    settings = asked(StatusSettings, [argument for argument in arguments if argument not in switches], "sfl status")
    configure_logging("WARNING")
    from rich.console import Console

    from sfl.wire.federation import PEER, FederationClient

    screen = Console()
    if not screen.is_terminal:
        screen.width = 200
    node = own_node(settings.tls, settings.federation)
    require_listening(settings.federation, PEER, settings.wait_s)
    client = FederationClient(settings.federation, "", settings.wait_s, settings.wait_s, node=node)
    try:
        if switches["--json"]:
            typer.echo(dumps(as_dict(client.status()), indent=2))
        elif switches["--watch"]:
            _follow(client, screen)
        else:
            screen.print(*shown(client.status()), sep="\n", highlight=False)
    finally:
        client.close()


def _follow(client: Any, screen: Any) -> None:
    from rich.console import Group
    from rich.live import Live

    while not screen.is_terminal:  # one after the other, for a file
        screen.print(*shown(client.status()), "", sep="\n", highlight=False)
        time.sleep(_EVERY_S)
    with Live(Group(*shown(client.status())), console=screen, auto_refresh=False) as live:
        while True:
            time.sleep(_EVERY_S)
            live.update(Group(*shown(client.status())), refresh=True)


def as_dict(message: Any) -> dict[str, Any]:
    """A message as plain data; what is unset is None."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            found[field.name] = [as_dict(each) if field.message_type else each for each in value]
        elif field.has_presence and not message.HasField(field.name):
            found[field.name] = None
        elif field.message_type:
            found[field.name] = as_dict(value)
        elif field.enum_type:
            found[field.name] = field.enum_type.values_by_number[value].name
        else:
            found[field.name] = value
    return found


def shown(reply: pb.StatusReply) -> Iterator[RenderableType]:
    """What a terminal shows, one after the other."""
    made = f" ({_ago(reply.version_age_s)})" if reply.HasField("version_age_s") else ""
    version = f"version {reply.version}{made}" if reply.HasField("version") else "no version yet"
    from rich.markup import escape

    yield f"[bold]{escape(reply.name)}[/bold] (sfl {escape(reply.sfl)}): {escape(reply.state)}"
    yield (
        f"{version}, {reply.aggregations} made of {reply.submissions} submissions, {reply.refused} updates refused;"
        f" {reply.joined} of {reply.expected} devices have joined;"
        f" up {_span(reply.uptime_s)}, {_mb(reply.memory_bytes)} MB of memory"
    )
    devices = [member for member in reply.members if member.role == pb.DEVICE]
    edges = [member for member in reply.members if member.role == pb.EDGE]
    if devices:
        yield _devices(devices)
    if edges:
        yield _edges(edges)
    behind = [member for member in reply.members if member.slow]
    for member in behind:
        yield f"[yellow]{escape(member.name)}[/yellow]: {escape(member.slow)}"
    if devices and not behind:
        yield "nobody is behind"


def _devices(members: list[pb.MemberStatus]) -> Table:
    table = _table(_OF_DEVICES)
    for member in members:
        report, known = member.report, member.HasField("report")
        table.add_row(
            _plain(member.name),
            _plain(_state(member)),
            _plain(member.edge or "-"),
            str(member.cut),
            f"{report.steps}/{report.planned_steps}" if known else "-",
            str(report.version) if known else "-",
            _number(report, "loss", 4),
            _number(report, "step_s", 2),
            _ago(report.step_age_s + member.report_age_s) if report.HasField("step_age_s") else "-",
            _mb(report.bytes_sent) if known else "-",
            _mb(report.bytes_received) if known else "-",
            _memory(report) if known else "-",
            str(member.submissions),
            f"{member.link.bytes_per_s / 1e6:.2f}" if member.link.bytes_per_s else "-",
            style=_style(member),
        )
    return table


def _edges(members: list[pb.MemberStatus]) -> Table:
    table = _table(_OF_EDGES)
    for member in members:
        report, known = member.report, member.HasField("report")
        table.add_row(
            _plain(member.name),
            _plain(_state(member)),
            str(member.cut),
            str(len(report.sessions)) if known else "-",
            str(report.steps) if known else "-",
            _mb(report.bytes_sent) if known else "-",
            _mb(report.bytes_received) if known else "-",
            _memory(report) if known else "-",
            style=_style(member),
        )
    return table


def _table(columns: tuple[str, ...]) -> Table:
    """A table with these columns."""
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in columns:
        table.add_column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
    return table


def _plain(text: str) -> Text:
    """As it is, whatever square brackets it holds."""
    from rich.text import Text

    return Text(text)


def _state(member: pb.MemberStatus) -> str:
    """What a member does while it is there, and what it said when it stopped; else where it is."""
    tells = member.presence == "present" or (member.report.ended and member.presence != "left")
    return (tells and member.report.activity) or member.presence


def _style(member: pb.MemberStatus) -> str | None:
    if member.presence == "left":
        return "dim"
    return "yellow" if member.slow else None


def _memory(report: pb.ReportRequest) -> str:
    return f"{_mb(report.memory_bytes)} (at most {_mb(report.peak_memory_bytes)})"


def _number(report: pb.ReportRequest, name: str, digits: int) -> str:
    return f"{getattr(report, name):.{digits}f}" if report.HasField(name) else "-"  # type: ignore[arg-type]  # names of fields


def _mb(count: int) -> str:
    return f"{count / 1e6:.1f}" if count < 1e8 else f"{count / 1e6:.0f}"


def _ago(seconds: float) -> str:
    return f"{_span(seconds)} ago"


def _span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
