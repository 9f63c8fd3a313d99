"""Files that a server can have open: connections are some, and must leave enough for what it keeps on disk."""

from __future__ import annotations

import resource

from sfl.telemetry import log

_KEPT = 256  # for files, pipes, and connections that this process makes
_ENOUGH = 65_536  # more makes some programs slow that close all they might have


def connections_within(wanted: int) -> int:
    """How many of the `wanted` connections this process may take at a time; as many open files as it may have are allowed it.

    Whoever fills them up, a stranger without a certificate too, leaves it the files that it needs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _ENOUGH if hard == resource.RLIM_INFINITY else min(hard, _ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        soft = most
    room = wanted if soft == resource.RLIM_INFINITY else max(1, soft - _KEPT)
    if room < wanted:
        log.warning(
            "this process may have %d files open, so it takes %d connections at a time and not %d (limits.connections): raise"
            " LimitNOFILE, or `ulimit -n`",
            soft,
            room,
            wanted,
        )
    return min(room, wanted)
