"""A channel whose calls show this node's newest certificate, though gRPC's credentials never change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

import grpc

from sfl.identity.node import Node, Shown


class RenewedChannel(grpc.Channel):
    """Opened by `connect`, and once more when the certificate was renewed: new calls go there, open ones stay where they are."""

    def __init__(self, node: Node, connect: Callable[[Shown], grpc.Channel]) -> None:
        self._node = node
        self._connect = connect
        self._lock = threading.Lock()
        self._shown = node.shown()
        self._channels = [connect(self._shown)]  # the newest last
        self._closed = False

    def newest(self) -> grpc.Channel:
        with self._lock:
            shown = self._node.shown()
            if shown is not self._shown and not self._closed:
                self._shown = shown
                self._channels.append(self._connect(shown))
            return self._channels[-1]

    def subscribe(self, callback: Any, try_to_connect: Any = None) -> None:
        self._channels[-1].subscribe(callback, try_to_connect)

    def unsubscribe(self, callback: Any) -> None:
        self._channels[-1].unsubscribe(callback)

    def unary_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._method("unary_unary", arguments, options)

    def unary_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._method("unary_stream", arguments, options)

    def stream_unary(self, *arguments: Any, **options: Any) -> Any:
        return self._method("stream_unary", arguments, options)

    def stream_stream(self, *arguments: Any, **options: Any) -> Any:
        return self._method("stream_stream", arguments, options)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for channel in self._channels:
                channel.close()

    def _method(self, kind: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Callable[..., Any]:
        """As a stub asks for it once; the channel is chosen at each call."""
        made: dict[grpc.Channel, Any] = {}

        def call(*request: Any, **more: Any) -> Any:
            channel = self.newest()
            if channel not in made:
                made[channel] = getattr(channel, kind)(*arguments, **options)
            return made[channel](*request, **more)

        return call

    def __enter__(self) -> RenewedChannel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
