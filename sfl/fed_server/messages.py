"""Members and halves of updates from their wire form."""

from __future__ import annotations

from sfl.errors import WireError
from sfl.fed_server.members import Member, Role
from sfl.fed_server.pool import Half
from sfl.v1 import federation_pb2 as pb
from sfl.wire.adapters import lora_from_wire

_ROLES: dict[pb.Role, Role] = {pb.DEVICE: "device", pb.EDGE: "edge"}


def member_from_wire(request: pb.JoinRequest) -> Member:
    """Raises `WireError` for an unknown role."""
    return Member(
        name=request.name,
        role=_role(request.role),
        task=request.task,
        base_model=request.base_model,
        model_fingerprint=request.model_fingerprint,
        lora=lora_from_wire(request.lora),
        cut=request.cut,
        examples=request.examples,
        labels=tuple(request.labels),
        columns=tuple(request.columns),
        max_length=request.max_length,
        rank=request.rank,
        edge=request.edge,
        label_counts=tuple(request.label_counts),
    )


def half_from_wire(header: pb.UpdateHeader) -> Half:
    """Raises `WireError` for an unknown role."""
    measured = header.link.bytes_per_s > 0
    return Half(
        submission=header.submission,
        device=header.device,
        half=_role(header.half),
        version=header.version,
        examples=header.examples,
        steps=header.steps,
        failures=header.link.failures,
        bytes_per_s=header.link.bytes_per_s if measured else None,
        round_trip_s=header.link.round_trip_s if measured else None,
    )


def _role(role: pb.Role) -> Role:
    if role not in _ROLES:
        raise WireError(f"role {role} is unknown: a member is a device or an edge server")
    return _ROLES[role]
