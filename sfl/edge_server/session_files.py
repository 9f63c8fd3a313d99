"""The edge's side of checkpoints: a file for each device, which holds its session as of the newest one."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from sfl.adapters.state import AdapterKey, AdapterState
from sfl.edge_server.engine import EdgeEngine, Session, request_of
from sfl.edge_server.uploads import TakenHalf
from sfl.errors import SflError, StateError, StateWriteError
from sfl.state_file import Document, Tensors, read_state, write_state
from sfl.telemetry import log
from sfl.wire.split import SessionRequest

_SUFFIX = ".state"


@dataclass(frozen=True)
class KeptSession:
    """What a file holds: an engine's `state` of a session, the number of the checkpoint, and halves that may not be sent yet."""

    request: SessionRequest
    checkpoint: int
    document: Document
    tensors: Tensors
    halves: tuple[TakenHalf, ...]


class SessionFiles:
    """Writes and reads sessions in `folder`, which is made; those of another than `federation`, by its id, are as good as none.

    Raises `StateWriteError` where the folder cannot be made.
    """

    def __init__(self, folder: Path, federation: Callable[[], str] = str) -> None:
        self._folder = folder
        self._federation = federation
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StateWriteError(f"sessions cannot be kept in {folder}: {error.strerror or error}") from error

    def write(self, engine: EdgeEngine, session: Session, checkpoint: int, halves: Iterable[TakenHalf]) -> None:
        """Keep a session under this number, in the place of what was kept of its device. Raises `StateWriteError`."""
        document, tensors = engine.state(session)
        document |= {"federation": self._federation(), "checkpoint": checkpoint, "halves": []}
        for index, half in enumerate(halves):
            document["halves"].append({"submission": half.submission, "version": half.version})
            tensors |= {f"half{index}/{key}": value for key, value in half.progress.items()}
        write_state(self._path(session.request.device), document, tensors)

    def read(self, device: str) -> KeptSession | None:
        """What is kept of a device; None if there is nothing, or, which is logged, nothing that can be used.

        Raises `OSError` when it cannot be read for the moment.
        """
        path = self._path(device)
        return self._read(path) if path.exists() else None

    def halves(self) -> Iterator[TakenHalf]:
        """Those of all devices that may not have been sent yet. Raises as `read` does."""
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            kept = self._read(path)
            if kept is not None:
                yield from kept.halves

    def delete(self, device: str) -> None:
        """Forget a device."""
        self._delete(self._path(device))

    def sweep(self, keep_s: float, in_use: Collection[str]) -> None:
        """Delete what was last written more than `keep_s` seconds ago, and is of none of these devices. Raises `OSError`."""
        spared = {self._path(device) for device in in_use}
        for path in self._folder.iterdir():
            try:
                unused_s = time.time() - path.stat().st_mtime
            except FileNotFoundError:  # it was being written, or its device is done
                continue
            if path not in spared and unused_s > keep_s:
                log.warning("nobody has come back to the session in %s for %g s: it is deleted", path, keep_s)
                self._delete(path)

    def _read(self, path: Path) -> KeptSession | None:
        try:
            document, tensors = read_state(path)
            if document["federation"] != self._federation():
                log.warning("the session in %s is of another federation, and is left alone", path)
                return None
            request = request_of(document)
            halves = tuple(
                TakenHalf(request.device, half["submission"], half["version"], _half(tensors, index))
                for index, half in enumerate(document["halves"])
            )
            return KeptSession(request, document["checkpoint"], document, tensors, halves)
        except StateError as error:
            log.error("a session is lost: %s", error)
        except (SflError, KeyError, ValueError, TypeError) as error:
            log.error("a session is lost: %s holds none that this version understands (%r)", path, error)
        return None

    def _path(self, device: str) -> Path:
        """A name that no other device's has, whatever a device's name is made of."""
        digest = hashlib.sha256(device.encode()).hexdigest()
        return self._folder / f"{quote(device, safe='')[:64]}-{digest[:16]}{_SUFFIX}"

    def _delete(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s cannot be deleted, though nothing needs it any more: %s", path, error)


def _half(tensors: Tensors, index: int) -> AdapterState:
    prefix = f"half{index}/"
    return {AdapterKey.parse(name[len(prefix) :]): value for name, value in tensors.items() if name.startswith(prefix)}
