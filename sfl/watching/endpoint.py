"""A small HTTP server for those who watch a daemon: /metrics for Prometheus and /healthz for whoever keeps it running."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from sfl.errors import ListenError
from sfl.telemetry import log
from sfl.wire.address import check_address

_CONNECTIONS = 16  # at once; more are hung up on
_CALLER_S = 10.0  # that a caller may take, the silences between its bytes included


class Page(NamedTuple):
    """What a path answers."""

    status: int
    kind: str
    body: bytes


Pages = Mapping[str, Callable[[str], Page]]  # by path; called with the request's Accept header


class Endpoint:
    """Serves `pages` at `address` in threads of its own until `close`. Raises `ListenError` where it cannot be bound."""

    def __init__(self, address: str, pages: Pages) -> None:
        host, port = check_address(address)
        try:
            self._server = _Server((host.strip("[]"), port), pages)
        except OSError as error:
            why = error.strerror or str(error)
            raise ListenError(f"cannot listen on {address}: {why}; choose another with `metrics_listen`") from error
        self.address = f"{host}:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, name="watched", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(_CALLER_S)


def json_page(status: int, content: Mapping[str, Any]) -> Page:
    return Page(status, "application/json", (json.dumps(content) + "\n").encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], pages: Pages) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.pages = pages
        self._free = threading.Semaphore(_CONNECTIONS)
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        late = threading.Timer(_CALLER_S, _hang_up, (request,))
        late.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            late.cancel()
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("a caller of the metrics' address broke off", exc_info=True)


def _hang_up(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have come to its end just then
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    timeout = _CALLER_S
    server: _Server

    def do_GET(self) -> None:
        page = self.server.pages.get(self.path.partition("?")[0])
        answer = page(self.headers.get("Accept", "")) if page else Page(404, "text/plain", b"there are /metrics and /healthz\n")
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    def version_string(self) -> str:
        return "sfl"

    def log_message(self, format: str, *values: Any) -> None:
        log.debug("metrics: %s", format % values)
