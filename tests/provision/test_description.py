"""What a device takes from an edge server's description and answers, and what it refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sfl.adapters.layout import LoraSpec
from sfl.edge_server.provisioning import ProvisioningService
from sfl.errors import UnreachableError, WireError
from sfl.v1 import provision_pb2 as pb
from sfl.v1.split_pb2 import Heartbeat
from sfl.wire.provision import description_from_wire, description_to_wire
from tests.provision.made import DESCRIPTION, FINGERPRINT, Device, edge


def test_a_description_is_the_same_after_the_wire() -> None:
    assert description_from_wire(description_to_wire(DESCRIPTION)) == DESCRIPTION


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "painting"}, "the unknown task 'painting'"),
        ({"task": ""}, "the unknown task ''"),
        ({"lora": LoraSpec(0, 8.0, 0.0, ("q",))}, "LoRA rank 0"),
        ({"lora": LoraSpec(2**31, 8.0, 0.0, ("q",))}, "LoRA rank 2147483648"),
        ({"lora": LoraSpec(4, 0.0, 0.0, ("q",))}, r"LoRA alpha 0\.0"),
        ({"lora": LoraSpec(4, float("nan"), 0.0, ("q",))}, "LoRA alpha nan"),
        ({"lora": LoraSpec(4, float("inf"), 0.0, ("q",))}, "LoRA alpha inf"),
        ({"lora": LoraSpec(4, 8.0, 1.0, ("q",))}, r"LoRA dropout 1\.0"),
        ({"lora": LoraSpec(4, 8.0, float("nan"), ("q",))}, "LoRA dropout nan"),
        ({"lora": LoraSpec(4, 8.0, 0.0, ())}, "0 modules that get LoRA"),
        ({"lora": LoraSpec(4, 8.0, 0.0, ("q" * 2000,))}, "of 2000 characters"),
        ({"lowest_cut": 0}, "4 blocks and cuts from 0 on"),
        ({"lowest_cut": 4}, "4 blocks and cuts from 4 on"),
        ({"num_layers": 10_001}, "10001 blocks"),
        ({"precisions": ()}, "and 0 precisions"),
        ({"source": "c" * 63}, "a source that is no SHA-256"),
        ({"fingerprint": ""}, "a fingerprint or a source that is no SHA-256"),
        ({"edge": "a\nb"}, r"the name 'a\\nb' of 3 characters"),
        ({"base_model": ""}, "the name ''"),
    ],
)
def test_a_description_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(WireError, match=f"described its model with .*{message}.*: does it run the same version of sfl"):
        description_from_wire(description_to_wire(replace(DESCRIPTION, **change)))


@pytest.mark.parametrize("config", ["", "{", "[]", "7", "[" * 200_000])
def test_a_configuration_that_is_none_is_refused(config: str) -> None:
    message = description_to_wire(DESCRIPTION)
    message.config = config
    with pytest.raises(WireError, match="described its model with a configuration that is no JSON"):
        description_from_wire(message)


def test_an_edge_of_another_version_is_a_clear_error(tmp_path: Path) -> None:
    class Newer(ProvisioningService):
        async def Describe(self, request: pb.DescribeRequest, context: Any) -> pb.Description:
            return pb.Description(edge="edge", model_fingerprint=FINGERPRINT, config="{}")  # the rest is said otherwise

    with edge(tmp_path / "edge", service=Newer) as served, pytest.raises(WireError, match="does it run the same version"):
        Device(tmp_path, served.address).start()


def test_empty_pieces_do_not_go_on_for_ever(tmp_path: Path) -> None:
    class Empty(ProvisioningService):
        async def Read(self, request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.FileChunk]:
            while True:
                yield pb.FileChunk()

    with (
        edge(tmp_path / "edge", service=Empty) as served,
        pytest.raises(WireError, match="sent an empty piece of model"),
    ):
        Device(tmp_path, served.address).start()


def test_heartbeats_without_a_half_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Never(ProvisioningService):
        async def Pack(self, request: pb.PackRequest, context: Any) -> AsyncIterator[pb.PackReply]:
            while not context.cancelled():
                yield pb.PackReply(heartbeat=Heartbeat())
                await self._on_disk(lambda: None)

    monkeypatch.setattr("sfl.wire.provision._PACK_S", 0.5)
    with edge(tmp_path / "edge", service=Never) as served, pytest.raises(UnreachableError, match="DEADLINE_EXCEEDED"):
        Device(tmp_path, served.address, give_up_s=0.1).start()
