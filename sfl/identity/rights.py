"""Who may call what: the whole of what a certificate allows, in one table. No network, no state.

A node speaks for itself alone: where a request names its sender, the certificate must hold that name. What is not in the table
nobody may call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfl.errors import RightsError, SflError, UnknownMemberError
from sfl.identity.identity import Identity, Role, called
from sfl.v1 import federation_pb2

# Whether a device (the first name) has a session with an edge server (the second); None where it has not said yet.
Serves = Callable[[str, str], bool | None]
Rule = Callable[[Identity, Any, Serves], SflError | None]  # why not; None where it may

_WIRE_ROLES: dict[Role, int] = {"device": federation_pb2.DEVICE, "edge": federation_pb2.EDGE}


def refusal(method: str, who: Identity, request: Any, serves: Serves) -> SflError | None:
    """Why `who` may not send `request`, a message to `method` ("/sfl.v1.Federation/Join"): a `RightsError`, or an
    `UnknownMemberError` where it may later. None where it may.

    To be asked for every message of a stream that is not a mere piece of the one before.
    """
    rule = _RULES.get(method)
    return RightsError(f"nobody may call {method}") if rule is None else rule(who, request, serves)


def as_itself(field: str, *roles: Role) -> Rule:
    """Nodes of these roles, each under the name that the request has in `field`."""

    def rule(who: Identity, request: Any, serves: Serves) -> SflError | None:
        return _role(who, *roles) or _name(who, getattr(request, field))

    return rule


def only(*roles: Role) -> Rule:
    """Nodes of these roles, whatever they ask."""
    return lambda who, request, serves: _role(who, *roles)


def _join(who: Identity, request: Any, serves: Serves) -> SflError | None:
    if (error := _role(who, "device", "edge") or _name(who, request.name)) is not None:
        return error
    return None if request.role == _WIRE_ROLES[who.role] else RightsError(f"{who} cannot join in another role than its own")


def _propose(who: Identity, request: Any, serves: Serves) -> SflError | None:
    return _role(who, "edge") or _name(who, request.proposal.edge)


def _submit(who: Identity, request: Any, serves: Serves) -> SflError | None:
    """Each side its own half: an edge server those of devices that have joined with its name."""
    update = request.update
    if update.half == federation_pb2.DEVICE:
        return _role(who, "device") or _name(who, update.device)
    if (error := _role(who, "edge")) is not None:
        return error
    if update.half != federation_pb2.EDGE:
        return RightsError(f"{who} sent no half of an update")
    served = serves(update.device, who.name)
    if served is None:
        return UnknownMemberError(f"device {_quoted(update.device)} has not said yet which edge server it has a session with")
    return None if served else RightsError(f"{who} cannot submit for device {_quoted(update.device)}, which has no session there")


def _train(who: Identity, request: Any, serves: Serves) -> SflError | None:
    """Whoever opened a stream speaks for its session on it, so only opening names a device."""
    error = _role(who, "device")
    return error or (_name(who, request.open.device) if request.WhichOneof("body") == "open" else None)


def _role(who: Identity, *roles: Role) -> SflError | None:
    if who.role in roles:
        return None
    return RightsError(f"{who} may not do what is for {' and '.join(f'{called(role)}s' for role in roles)} only")


def _name(who: Identity, name: str) -> SflError | None:
    return None if name == who.name else RightsError(f"{who} cannot speak as {_quoted(name)}: its certificate names it")


def _quoted(name: str) -> str:
    return f"{name[:100]!a}"


_RULES: dict[str, Rule] = {
    "/sfl.v1.Federation/Join": _join,
    "/sfl.v1.Federation/Check": _join,
    "/sfl.v1.Federation/Watch": as_itself("name", "device", "edge"),
    "/sfl.v1.Federation/Propose": _propose,
    "/sfl.v1.Federation/Submit": _submit,
    "/sfl.v1.Federation/Fetch": as_itself("name", "device", "edge"),
    "/sfl.v1.Federation/Leave": as_itself("name", "device"),
    "/sfl.v1.Federation/Report": as_itself("name", "device", "edge"),
    "/sfl.v1.Federation/Status": only("operator"),
    "/sfl.v1.SplitTraining/Train": _train,
    "/sfl.v1.Provisioning/Describe": as_itself("device", "device"),
    "/sfl.v1.Provisioning/Pack": as_itself("device", "device"),
    "/sfl.v1.Provisioning/Read": as_itself("device", "device"),
    "/grpc.health.v1.Health/Check": only("device", "edge", "fed", "operator"),
    "/grpc.health.v1.Health/Watch": only("device", "edge", "fed", "operator"),
}
