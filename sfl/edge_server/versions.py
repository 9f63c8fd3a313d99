"""The global versions that the edge's sessions stem from, fetched once for all of them."""

from __future__ import annotations

import asyncio

from sfl.adapters.state import AdapterState
from sfl.wire.federation import FederationClient

_KEPT = 2  # the newest version and the one that slower devices still adopt


class EdgeVersions:
    """The layers from `lowest_cut` on, head included, of the versions asked for last, at each rank that devices have."""

    def __init__(self, federation: FederationClient, lowest_cut: int) -> None:
        self._federation = federation
        self._lowest_cut = lowest_cut
        self._fetches: dict[tuple[int, int], asyncio.Task[AdapterState]] = {}  # by version and rank

    async def get(self, version: int, rank: int = 0) -> AdapterState:
        """Version `version` as devices of `rank` get it, 0 for that of the LoRA settings.

        Devices that ask for it at once share one fetch. Raises as `FederationClient.fetch` does.
        """
        fetch = self._fetches.get((version, rank))
        if fetch is None or _failed(fetch):
            fetch = asyncio.create_task(asyncio.to_thread(self._federation.fetch, version, self._lowest_cut, rank=rank))
            self._fetches[version, rank] = fetch
            newest = sorted({kept for kept, _ in self._fetches})[-_KEPT:]
            for old in [each for each, task in self._fetches.items() if each[0] not in newest and task.done()]:
                del self._fetches[old]
        return await asyncio.shield(fetch)

    def forget(self) -> None:
        """The federation has begun anew: its versions are others."""
        self._fetches.clear()


def _failed(fetch: asyncio.Task[AdapterState]) -> bool:
    return fetch.done() and (fetch.cancelled() or fetch.exception() is not None)
