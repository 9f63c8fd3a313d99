"""An edge server's service that is told to stop ends its streams, and warns of no device for that."""

from __future__ import annotations

import logging

import pytest

from sfl.device.edge_link import GrpcEdgeLink
from tests.edge_server.made import Halves, eventually, served


@pytest.mark.parametrize("told", [True, False], ids=["told", "cut off"])
def test_that_a_device_is_gone_is_a_warning_unless_the_edge_ends_the_stream(told: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sfl"), served(Halves()) as edge:
        link = GrpcEdgeLink(edge.address, edge.halves.request(), 5, 5)
        link.begin()
        link.step(1, 0, edge.halves.batch(1))

        async def end() -> None:
            if told:
                edge.service.stop()
            else:
                await edge._server.stop(0)

        edge.run(end())
        eventually(lambda: not edge.service._streams)
        link.hang_up()
    assert ("device-1 is gone after step 1" in caplog.text) is not told
