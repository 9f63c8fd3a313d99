"""What the tests of provisioning share: halves of arbitrary files, an edge that provides them over gRPC, and a device."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from sfl.adapters.layout import LoraSpec
from sfl.cache.cache import HalfCache
from sfl.cache.key import HalfKey
from sfl.device import provision
from sfl.device.provision import provided
from sfl.edge_server.packing import Packer, RequireRoom
from sfl.edge_server.provisioning import ProvisioningService
from sfl.model.packed import PackedHalf, write_packed
from sfl.settings import DeviceSettings
from sfl.telemetry import MetricsWriter
from sfl.v1.provision_pb2_grpc import add_ProvisioningServicer_to_server
from sfl.wire.channel import serve
from sfl.wire.provision import Description
from tests.metrics import events

FINGERPRINT, OTHER = "a" * 64, "b" * 64
SOURCE, OTHER_SOURCE = "c" * 64, "d" * 64
DESCRIPTION = Description(
    edge="edge",
    base_model="models/some",
    fingerprint=FINGERPRINT,
    task="classification",
    lora=LoraSpec(4, 8.0, 0.0, ("k", "q")),
    lowest_cut=1,
    num_layers=4,
    precisions=("fp32", "bf16", "int8"),
    config={"model_type": "bert", "num_hidden_layers": 4},
    source=SOURCE,
)
KEY = HalfKey(SOURCE, 2, "int8")
WEIGHTS = 5_500_000  # bytes, more than five blocks


def write_half(folder: Path, key: HalfKey = KEY, size: int = WEIGHTS) -> None:
    """Files as those of a half: its note, and `size` bytes of weights that depend on the key."""
    write_packed(folder, PackedHalf(FINGERPRINT, *key))
    (folder / "vocab.txt").write_bytes(b"")
    (folder / "model.safetensors").write_bytes(random.Random(str(key)).randbytes(size))


class Edge:
    """A provisioning service on a loop in a thread of its own, its packer `write` unless `pack` is given."""

    def __init__(
        self,
        cache: Path,
        description: Description = DESCRIPTION,
        write: Callable[[Path, HalfKey], None] = write_half,
        service: type[ProvisioningService] = ProvisioningService,
        limit_mb: float = 100.0,
        address: str = "127.0.0.1:0",
        pack: Packer | None = None,
    ) -> None:
        self.packed: list[HalfKey] = []
        self._write = write
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

        async def start() -> None:
            self.cache = HalfCache(cache, limit_mb)
            self.service = service(description, self.cache, pack or self._pack, MetricsWriter(None))
            self._server, self.address = serve(address)
            add_ProvisioningServicer_to_server(self.service, self._server)
            await self._server.start()

        asyncio.run_coroutine_threadsafe(start(), self._loop).result(20)

    async def _pack(self, key: HalfKey, folder: Path, require_room: RequireRoom) -> None:
        await require_room(WEIGHTS)
        self.packed.append(key)
        await asyncio.to_thread(self._write, folder, key)

    def close(self) -> None:
        async def stop() -> None:
            await self.service.close()
            await self._server.stop(0)

        asyncio.run_coroutine_threadsafe(stop(), self._loop).result(20)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@contextlib.contextmanager
def edge(cache: Path, **changes: Any) -> Iterator[Edge]:
    made = Edge(cache, **changes)
    try:
        yield made
    finally:
        made.close()


class Device:
    """A device that is started again and again, with one cache."""

    def __init__(self, folder: Path, address: str, **changes: Any) -> None:
        common: dict[str, Any] = {"name": "d", "edge": address, "cut": 2, "precision": "int8", "data": {"path": __file__}}
        self.settings = DeviceSettings.model_validate(
            {"wait_s": 5, "give_up_s": 5, "cache": folder / "cache", "out": folder / "out", **common, **changes}
        )
        self.cache = HalfCache(folder / "cache", 0)

    def start(self, **changes: Any) -> DeviceSettings:
        """The settings in force, as after the start of a process that has ended since."""
        try:
            return provided(self.settings.model_copy(update=changes))
        finally:
            provision.release_halves()

    def last(self) -> dict[str, Any]:
        """The last report."""
        return events(self.settings.out, "provision")[-1]


def same_files(one: Path, other: Path) -> bool:
    files = sorted(path.name for path in one.iterdir())
    return files == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in files
    )


def with_model(fingerprint: str, source: str) -> Description:
    return replace(DESCRIPTION, fingerprint=fingerprint, source=source, base_model=f"models/{fingerprint[0]}")


def damage(path: Path, position: int) -> None:
    """Change one byte."""
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
