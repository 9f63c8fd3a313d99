"""What this process is doing, for whoever watches its memory: import, load, tokenise, forward, wait, backward, step and so on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Listener = Callable[[str], None]

IDLE = "idle"
_current = IDLE
_listeners: list[Listener] = []


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say that this process is in phase `name` until the block ends, and then in the one that it was in before."""
    before = _current
    _enter(name)
    try:
        yield
    finally:
        _enter(before)


@contextmanager
def watching(listener: Listener) -> Iterator[None]:
    """Call `listener` with the new phase at every change, in the thread that changes it, until the block ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def _enter(name: str) -> None:
    global _current
    _current = name
    for listener in _listeners:
        listener(name)
