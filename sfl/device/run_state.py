"""What a device's run has come to, apart from its adapter: what a checkpoint keeps of it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.state_file import Document, Tensors
from sfl.v1.federation_pb2 import UpdateHeader

_PENDING = "pending"


def new_session(device: str) -> str:
    """A name that no other session of the device has had."""
    return f"{device}-{secrets.token_hex(4)}"


@dataclass
class Pending:
    """This device's half of the last submission, until it is `sent`, and while the next version is waited for.

    Whether the edge has `answered` that it has its own is not known of one from a checkpoint; then it may have.
    """

    header: UpdateHeader
    trigger: str
    progress: AdapterState
    answered: bool = True
    sent: bool = False


@dataclass
class RunState:
    """Counts, and what comes next."""

    session: str
    steps: int = 0
    examples: int = 0
    submissions: int = 0
    pending_steps: int = 0  # that the next update holds
    pending_examples: int = 0
    upload_bytes: int = 0  # of the last upload, and so of the next
    waiting: bool = False  # for a version newer than the adapter's
    unseen: bool = True  # a version was taken over, and the upload rule has not been told
    tested: bool = False  # all is done that the edge is needed for
    pending: Pending | None = None
    step_seconds: list[float] = field(default_factory=list)  # of the last steps
    bytes_sent: int = 0  # by processes before this one
    bytes_received: int = 0

    def sent(self, steps: int) -> bool:
        """Whether `steps` steps are done, and this device's half of all that is submitted of them has been sent."""
        return self.steps >= steps and (self.pending is None or self.pending.sent)

    def saved(self) -> tuple[Document, Tensors]:
        """This as a document, JSON-serialisable, and tensors."""
        document: dict[str, Any] = {name: value for name, value in vars(self).items() if name != _PENDING}
        if self.pending is None:
            return document, {}
        pending = self.pending
        tensors = {f"{_PENDING}/{key}": value for key, value in pending.progress.items()}
        header = pending.header.SerializeToString().hex()
        return document | {_PENDING: {"header": header, "trigger": pending.trigger, "sent": pending.sent}}, tensors

    @classmethod
    def restored(cls, document: Document, tensors: Tensors) -> RunState:
        """What was saved."""
        fields = dict(document)
        if (kept := fields.pop(_PENDING, None)) is not None:
            prefix = f"{_PENDING}/"
            found = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
            progress = {AdapterKey.parse(name): value for name, value in found.items()}
            header = UpdateHeader.FromString(bytes.fromhex(kept["header"]))
            fields[_PENDING] = Pending(header, kept["trigger"], progress, sent=kept["sent"])
        return cls(**fields)
