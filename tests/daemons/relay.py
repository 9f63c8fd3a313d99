"""A way between two daemons on this machine that can fall silent, as one does when a cable is cut somewhere in the middle."""

from __future__ import annotations

import contextlib
import socket
import threading

_PIECE = 65_536


class Relay:
    """Passes on what comes to `address`; a context manager. While it is cut nothing arrives at either end, and nobody is told."""

    def __init__(self, to: str) -> None:
        host, _, port = to.rpartition(":")
        self._to = host, int(port)
        self._whole = threading.Event()
        self._whole.set()
        self._sockets: list[socket.socket] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"

    def cut(self) -> None:
        self._whole.clear()

    def mend(self) -> None:
        """What was sent in the meantime arrives now."""
        self._whole.set()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the end
            while True:
                self._join(self._listening.accept()[0])

    def _join(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._to)
        except OSError:  # nobody listens there
            near.close()
            return
        self._sockets += [near, far]
        for one, other in ((near, far), (far, near)):
            threading.Thread(target=self._pass, args=(one, other), daemon=True).start()

    def _pass(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := one.recv(_PIECE):
                self._whole.wait()
                other.sendall(piece)
        for each in (one, other):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> Relay:
        threading.Thread(target=self._accept, name="relay", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._whole.set()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        for each in (self._listening, *self._sockets):
            each.close()
