"""Versions at the edge: fetched once for all who ask, and asked for anew when that failed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable
from typing import cast

import pytest

from sfl.adapters.state import AdapterState
from sfl.edge_server.uploads import HalfUploads, TakenHalf
from sfl.edge_server.versions import EdgeVersions
from sfl.errors import RefusedError, UnreachableError
from sfl.wire.federation import FederationClient
from tests.edge_server.made import RecordingFederation
from tests.fed_server.made import adapter, same


def made() -> tuple[RecordingFederation, EdgeVersions]:
    federation = RecordingFederation(adapter(0))
    federation.publish(1)
    federation.publish(2)
    return federation, EdgeVersions(cast(FederationClient, federation), 2)


async def ask(versions: Awaitable[AdapterState]) -> AdapterState:
    return await asyncio.wait_for(versions, 5)


def test_those_who_ask_share_one_fetch_of_the_edges_layers() -> None:
    async def work() -> None:
        federation, versions = made()
        found = await asyncio.gather(*(versions.get(1) for _ in range(5)))
        assert all(state is found[0] for state in found)
        assert {key.layer for key in found[0]} == {key.layer for key in federation.versions[1] if key.layer >= 2}
        await versions.get(2)
        await versions.get(1)
        assert federation.fetches == [1, 2]
        await versions.get(0)  # older than the two that are kept
        assert same(await versions.get(2), await versions.get(2))
        assert federation.fetches == [1, 2, 0]

    asyncio.run(work())


def test_a_fetch_waits_for_no_half_that_cannot_be_sent() -> None:
    async def work() -> None:
        federation, versions = made()
        federation.open.clear()
        uploads = HalfUploads(cast(FederationClient, federation))
        for number in range((os.cpu_count() or 1) + 4):  # threads that asyncio has for all else
            uploads.start(TakenHalf(f"device-{number}", "s/1", 0, {}))
        await asyncio.sleep(0)
        try:
            await ask(versions.get(1))
        finally:
            federation.open.set()
        await uploads.finish("device-0")

    asyncio.run(work())


def test_each_rank_is_a_fetch_of_its_own_and_goes_with_its_version() -> None:
    async def work() -> None:
        federation, versions = made()
        small, whole, again = await asyncio.gather(versions.get(0, 1), versions.get(0), versions.get(0, 1))
        assert again is small
        ranks = [{value.shape[0] for key, value in state.items() if key.part == "A"} for state in (small, whole)]
        assert ranks == [{1}, {2}]
        assert sorted(zip(federation.fetches, federation.ranks)) == [(0, 0), (0, 1)]
        await versions.get(1, 1)
        await versions.get(2)
        assert len(federation.fetches) == 4
        for rank in (0, 1):  # not among the two newest any more, at whatever rank
            await versions.get(0, rank)
        assert len(federation.fetches) == 6

    asyncio.run(work())


def test_a_failed_fetch_is_not_kept() -> None:
    async def work() -> None:
        federation, versions = made()
        with pytest.raises(RefusedError, match="no version 7"):
            await ask(versions.get(7))
        federation.failure = UnreachableError("gone")
        impatient = asyncio.create_task(versions.get(1))
        await asyncio.sleep(0)
        impatient.cancel()  # nobody hears of the failure
        await asyncio.sleep(0.1)
        federation.failure = None
        assert await ask(versions.get(1))
        assert federation.fetches == [7, 1, 1]

    asyncio.run(work())
