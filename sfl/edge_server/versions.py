"""The global versions that the edge's sessions stem from, fetched once for all of them."""

from __future__ import annotations

import asyncio

from sfl.adapters.state import AdapterState
from sfl.wire.federation import FederationClient

_KEPT = 2  # the newest version and the one that slower devices still adopt


class EdgeVersions:
    """The layers from `lowest_cut` on, head included, of the versions asked for last."""

    def __init__(self, federation: FederationClient, lowest_cut: int) -> None:
        self._federation = federation
        self._lowest_cut = lowest_cut
        self._fetches: dict[int, asyncio.Task[AdapterState]] = {}

    async def get(self, version: int) -> AdapterState:
        """Version `version`; devices that ask for it at once share one fetch. Raises as `FederationClient.fetch` does."""
        fetch = self._fetches.get(version)
        if fetch is None or _failed(fetch):
            fetch = asyncio.create_task(asyncio.to_thread(self._federation.fetch, version, self._lowest_cut))
            self._fetches[version] = fetch
            for old in sorted(self._fetches)[:-_KEPT]:
                if self._fetches[old].done():
                    del self._fetches[old]
        return await asyncio.shield(fetch)


def _failed(fetch: asyncio.Task[AdapterState]) -> bool:
    return fetch.done() and (fetch.cancelled() or fetch.exception() is not None)
