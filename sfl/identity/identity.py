"""Who a node is: a role and a name, which its certificate holds as a URI."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args
from urllib.parse import quote, unquote

Role = Literal["device", "edge", "fed", "operator"]
ROLES: tuple[Role, ...] = get_args(Role)
SERVERS: tuple[Role, ...] = ("edge", "fed")  # roles that others dial, whose certificates hold their addresses
_CALLED: dict[Role, str] = {"edge": "edge server", "fed": "federation server"}
_SCHEME = "sfl://"


@dataclass(frozen=True)
class Identity:
    """A role and a name; no two nodes of an authority have the same name."""

    role: Role
    name: str

    @property
    def uri(self) -> str:
        """As a certificate has it among its alternative names: `sfl://device/pi-1`."""
        return f"{_SCHEME}{self.role}/{quote(self.name, safe='')}"

    @classmethod
    def from_uri(cls, uri: str) -> Identity | None:
        """None for a URI that is not exactly that of an identity."""
        role, _, name = uri.removeprefix(_SCHEME).partition("/")
        if role not in ROLES or not name:
            return None
        identity = cls(role, unquote(name))
        return identity if identity.uri == uri else None

    def __str__(self) -> str:
        return f"{called(self.role)} '{self.name}'"


def called(role: Role) -> str:
    """The role in words."""
    return _CALLED.get(role, role)
