"""Sessions between the engine and their files: when a checkpoint is written, and which one a device may go on from."""

from __future__ import annotations

from sfl.edge_server.engine import EdgeEngine, Session
from sfl.edge_server.session_files import SessionFiles
from sfl.edge_server.uploads import HalfUploads, TakenHalf
from sfl.errors import AdapterError, WireError
from sfl.telemetry import log
from sfl.wire.split import SessionRequest, Standing


class Keeper:
    """Called by the worker alone, as all that changes sessions, but for `send_kept`. Without `files` checkpoints are only
    counted."""

    def __init__(self, engine: EdgeEngine, uploads: HalfUploads, files: SessionFiles | None) -> None:
        self._engine = engine
        self._uploads = uploads
        self._files = files
        self._sent_kept = False

    def send_kept(self) -> None:
        """Begin to send the halves in all files, once; on the event loop, and before any session is opened, as that writes a file
        anew. Raises `OSError` when one cannot be read for the moment: then they have to be asked for again."""
        if self._files is not None and not self._sent_kept:
            for half in self._files.halves():
                self._uploads.start(half)
        self._sent_kept = True

    def keep(self, session: Session, checkpoint: int, *taken: TakenHalf) -> None:
        """Write a checkpoint with the halves that are not sent yet, unless it is the one that is there, or 0.

        Raises `WireError` for a number that does not follow, and `StateWriteError`.
        """
        if checkpoint in (0, session.checkpoint):
            return
        device = session.request.device
        if session.checkpoint and checkpoint != session.checkpoint + 1:
            raise WireError(f"checkpoint {checkpoint} of {device} came, {session.checkpoint + 1} was due")
        if self._files is not None:
            halves = {half.submission: half for half in (*self._uploads.unsent(device), *taken)}
            self._files.write(self._engine, session, checkpoint, halves.values())
        session.checkpoint = checkpoint

    def restored(self, request: SessionRequest, standing: Standing) -> Session | None:
        """The session as of its checkpoint; None if there is none, or none that the device holds too.

        Raises `RefusedError` when this edge is not any more what it was, `OSError` when its file cannot be read for the moment.
        """
        kept = None if self._files is None else self._files.read(request.device)
        if kept is None or kept.request.session != request.session:
            return None
        if kept.checkpoint not in standing.checkpoints:
            log.error("the session of %s is lost: it does not hold checkpoint %d", request.device, kept.checkpoint)
            return None
        if kept.request.rules.shared_edge_adapter:
            log.warning("%s cannot go back to a checkpoint: others train the same adapter; it begins anew", request.device)
            return None
        try:
            session = self._engine.restore(kept.document, kept.tensors)
        except (AdapterError, WireError, KeyError, ValueError, TypeError) as error:
            log.error("the session of %s is lost: its checkpoint %d cannot be used (%r)", request.device, kept.checkpoint, error)
            return None
        session.checkpoint = kept.checkpoint
        session.progress = next((h.progress for h in kept.halves if h.submission == session.last_submission), None)
        return session
