"""Members and halves of updates from their wire form, within bounds: all of it is kept, on disk and in the log."""

from __future__ import annotations

from sfl.errors import WireError
from sfl.fed_server.members import Member, Role
from sfl.fed_server.pool import Half
from sfl.v1 import federation_pb2 as pb
from sfl.wire.adapters import lora_from_wire

LONGEST_NAME = 100  # bytes of a member's name, as of those in certificates
LONGEST_ID = 200  # characters of a submission's id, which begins with a device's name
_LONGEST = 1000  # characters of anything else
_MOST = 1000  # labels, columns or modules
_ROLES: dict[pb.Role, Role] = {pb.DEVICE: "device", pb.EDGE: "edge"}


def member_from_wire(request: pb.JoinRequest) -> Member:
    """Raises `WireError` for an unknown role, and for names and lists that nobody has."""
    _require_name(request.name)
    _require_name(request.edge)
    lists = (request.labels, request.columns, request.lora.target_modules)
    texts = [request.task, request.base_model, request.model_fingerprint, *(each for texts in lists for each in texts)]
    if any(len(text) > _LONGEST for text in texts) or max(len(request.label_counts), *(len(texts) for texts in lists)) > _MOST:
        raise WireError(
            f"'{request.name}' says too much of itself: at most {_MOST} labels, columns or modules, of {_LONGEST} characters each"
        )
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
    """Raises `WireError` for an unknown role, and for an id or a name that nobody has."""
    _require_name(header.device)
    if len(header.submission) > LONGEST_ID or not header.submission.isprintable():
        raise WireError(f"the id of a submission has at most {LONGEST_ID} printable characters, and not {len(header.submission)}")
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


def _require_name(name: str) -> None:
    if len(name.encode()) > LONGEST_NAME or not name.isprintable():
        raise WireError(f"a name has at most {LONGEST_NAME} bytes and can be printed: {name[:LONGEST_NAME]!a} is none")


def _role(role: pb.Role) -> Role:
    if role not in _ROLES:
        raise WireError(f"role {role} is unknown: a member is a device or an edge server")
    return _ROLES[role]
