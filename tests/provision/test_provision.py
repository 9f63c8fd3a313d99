"""A device that has nothing but an edge server's address, over gRPC; the halves are arbitrary files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from sfl.cache.key import HalfKey
from sfl.cache.manifest import BLOCK_BYTES
from sfl.device import provision
from sfl.device.provision import provided
from sfl.edge_server.provisioning import ProvisioningService
from sfl.errors import DataError, ModelError, RefusedError, SettingsError, SflError, UnreachableError, WireError
from sfl.v1 import provision_pb2 as pb
from sfl.wire.channel import serve
from tests.provision.made import (
    FINGERPRINT,
    KEY,
    OTHER,
    OTHER_SOURCE,
    SOURCE,
    WEIGHTS,
    Device,
    Edge,
    damage,
    edge,
    same_files,
    with_model,
    write_half,
)

ROOT = Path(__file__).parents[2]
REPLIES = 5_000  # bytes, more than description and checksums take


class Tampering(ProvisioningService):
    """Has something done to each chunk: `at` is called with the bytes sent before it, and with it."""

    at: Any = staticmethod(lambda sent, chunk: chunk)

    async def Read(self, request: pb.ReadRequest, context: Any) -> AsyncIterator[pb.FileChunk]:
        async for chunk in super().Read(request, context):
            try:
                yield type(self).at(self.bytes_sent - len(chunk.data), chunk)
            except UnreachableError as error:
                await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            await asyncio.sleep(0)


def tampering(at: Any) -> type[Tampering]:
    return type("Tampered", (Tampering,), {"at": staticmethod(at)})


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Edge]:
    with edge(tmp_path / "edge") as made:
        yield made


def test_an_empty_cache_is_filled_with_the_edge_s_half(served: Edge, tmp_path: Path) -> None:
    device = Device(tmp_path, served.address)
    settings = device.start()
    assert settings.model is not None
    folder = Path(settings.model)
    assert folder == device.cache.model(KEY) and same_files(folder, served.cache.model(KEY))
    assert (settings.task, settings.cut, settings.precision) == ("classification", 2, "int8")
    assert settings.lora.spec() == served.service._description.lora
    report = device.last()
    assert report["bytes"] - WEIGHTS < 1000 and report["bytes_cached"] == 0
    assert report["bytes"] < report["bytes_received"] < 1.02 * WEIGHTS


def test_a_device_with_a_model_asks_nobody(tmp_path: Path) -> None:
    device = Device(tmp_path, "127.0.0.1:1", model="models/mine")
    assert provided(device.settings) == device.settings.model_copy(update={"tight_memory": False})
    assert list(tmp_path.iterdir()) == []


def test_the_second_start_fetches_nothing(served: Edge, tmp_path: Path) -> None:
    device = Device(tmp_path, served.address)
    first = device.start()
    shutil.rmtree(served.cache.folder)  # it is not even looked at
    assert device.start() == first
    assert served.packed == [KEY]
    report = device.last()
    assert report["bytes_cached"] == report["bytes"] > WEIGHTS
    assert 0 < report["bytes_received"] < 1000


@pytest.mark.parametrize("change", ["byte", "shorter", "longer", "gone", "manifest"])
def test_a_damaged_cache_is_found_and_mended(served: Edge, tmp_path: Path, change: str, caplog: pytest.LogCaptureFixture) -> None:
    device = Device(tmp_path, served.address)
    device.start()
    weights = device.cache.model(KEY) / "model.safetensors"
    if change == "byte":
        damage(weights, 2 * BLOCK_BYTES + 5)
    elif change == "gone":
        weights.unlink()
    elif change == "manifest":
        (device.cache.model(KEY).parent / "manifest.json").write_text("{}")
    else:
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] if change == "shorter" else content + b"x")
    with caplog.at_level(logging.WARNING, "sfl"):
        device.start()
    assert same_files(device.cache.model(KEY), served.cache.model(KEY))
    assert len(device.cache.entries()) == 1
    fetched = device.last()["bytes"] - device.last()["bytes_cached"]
    assert fetched == {"byte": BLOCK_BYTES, "gone": WEIGHTS, "manifest": 0}.get(change, WEIGHTS % BLOCK_BYTES)
    assert ("is damaged in the cache" in caplog.text) == (change != "manifest")


def test_a_connection_that_breaks_goes_on_where_it_was(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    breaks = iter([1_300_000, 3_000_000, 4_000_000])
    due = [next(breaks)]

    def at(sent: int, chunk: pb.FileChunk) -> pb.FileChunk:
        if due[0] and sent > due[0]:
            due[0] = next(breaks, 0)
            raise UnreachableError("a cable was pulled")
        return chunk

    with caplog.at_level(logging.WARNING, "sfl"), edge(tmp_path / "edge", service=tampering(at)) as served:
        device = Device(tmp_path, served.address)
        device.start()
        assert same_files(device.cache.model(KEY), served.cache.model(KEY))
    assert caplog.text.count("a cable was pulled); trying again in") == 3
    assert device.last()["bytes_received"] < WEIGHTS + 3 * BLOCK_BYTES + 4 * REPLIES


def test_an_edge_that_never_sends_is_given_up(tmp_path: Path) -> None:
    def at(sent: int, chunk: pb.FileChunk) -> pb.FileChunk:
        raise UnreachableError("a disk is on fire")

    fails = pytest.raises(UnreachableError, match=r"a disk is on fire\); gave up after [12] s")
    with edge(tmp_path / "edge", service=tampering(at)) as served, fails:
        Device(tmp_path, served.address, give_up_s=1).start()


def test_a_killed_device_goes_on_where_it_was(tmp_path: Path) -> None:
    def at(sent: int, chunk: pb.FileChunk) -> pb.FileChunk:
        if sent > 3_000_000:
            time.sleep(0.2)  # the rest comes slowly
        return chunk

    with edge(tmp_path / "edge", service=tampering(at)) as served:
        device = Device(tmp_path, served.address)
        script = (
            "import sys; from sfl.device.provision import provided; from sfl.settings import DeviceSettings;"
            "provided(DeviceSettings.model_validate_json(sys.argv[1]))"
        )
        child = subprocess.Popen([sys.executable, "-c", script, device.settings.model_dump_json(exclude_unset=True)], cwd=ROOT)
        part = tmp_path / "cache" / SOURCE / "cut-2-int8.part" / "model" / "model.safetensors"
        deadline = time.monotonic() + 30
        while not part.is_file() or part.stat().st_size < 2 * BLOCK_BYTES:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        child.kill()
        assert child.wait() != 0
        there = part.stat().st_size // BLOCK_BYTES * BLOCK_BYTES
        assert there < WEIGHTS
        damage(part, 7)  # as if the machine had lost power
        settings = device.start()
        assert same_files(Path(str(settings.model)), served.cache.model(KEY))
    assert device.last()["bytes_cached"] == there - BLOCK_BYTES
    assert served.packed == [KEY]


def test_two_devices_that_share_a_cache_fetch_once_and_use_it_together(served: Edge, tmp_path: Path) -> None:
    """Each keeps the half in use when it has it, so that the other, which has found nothing at first, cannot write any more."""
    devices = [Device(tmp_path, served.address, name=name, out=tmp_path / name, join_wait_s=20) for name in ("one", "two")]
    reader = devices[0].cache.try_lock(KEY, shared=True)  # until both have looked
    assert reader is not None
    try:
        with ThreadPoolExecutor() as pool:
            starts = [pool.submit(provided, device.settings) for device in devices]
            time.sleep(1)
            assert not any(start.done() for start in starts)
            reader.release()
            found = {start.result(15).model for start in starts}
    finally:
        provision.release_halves()
    assert found == {str(devices[0].cache.model(KEY))}
    received = sorted(device.last()["bytes_received"] for device in devices)
    assert received[0] < REPLIES and received[1] > WEIGHTS
    assert served.packed == [KEY]


def test_a_damaged_half_that_another_process_uses_is_waited_for_and_given_up(served: Edge, tmp_path: Path) -> None:
    device = Device(tmp_path, served.address, join_wait_s=0.3)
    device.start()
    damage(device.cache.model(KEY) / "model.safetensors", 9)
    reader = device.cache.try_lock(KEY, shared=True)
    assert reader is not None
    with reader, pytest.raises(UnreachableError, match="is not whole and which another process has taken; gave up"):
        device.start()
    device.start()
    assert same_files(device.cache.model(KEY), served.cache.model(KEY))


def test_another_model_at_the_next_start_is_an_error_until_it_is_cleared(tmp_path: Path) -> None:
    with edge(tmp_path / "edge") as served:
        device = Device(tmp_path, served.address)
        device.start()
    other = with_model(OTHER, OTHER_SOURCE)
    with edge(tmp_path / "edge", description=other, address=served.address) as served:
        with pytest.raises(ModelError) as caught:
            device.start()
        for part in (FINGERPRINT[:12], OTHER[:12], f"sfl cache clear --edge {served.address} --cache {tmp_path / 'cache'}"):
            assert part in str(caught.value)
        command = [
            sys.executable,
            "-m",
            "sfl.cli.main",
            "cache",
            "clear",
            "--edge",
            served.address,
            "--cache",
            tmp_path / "cache",
        ]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        assert done.stdout == "cleared 1 half, 5.5 MB\n"
        assert OTHER_SOURCE in str(device.start().model)


def test_another_tokenizer_at_the_next_start_is_packed_and_fetched_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with edge(tmp_path / "edge") as served:
        device = Device(tmp_path, served.address)
        first = device.start()
    other = with_model(FINGERPRINT, OTHER_SOURCE)
    with edge(tmp_path / "edge", description=other, address=served.address) as served, caplog.at_level(logging.WARNING, "sfl"):
        for _ in range(2):
            settings = device.start()
        assert served.packed == [HalfKey(OTHER_SOURCE, 2, "int8")]
        assert same_files(Path(str(settings.model)), served.cache.model(served.packed[0]))
    assert settings.model != first.model
    assert caplog.text.count("has another configuration, tokenizer or pack format than before: fetching its half anew") == 1


def test_what_a_running_edge_provides_is_in_use_but_makes_room(tmp_path: Path) -> None:
    with edge(tmp_path / "edge") as served:
        assert not served.cache.in_use(KEY)
        Device(tmp_path, served.address).start()
        assert served.cache.in_use(KEY)
        served.cache.make_room(HalfKey(SOURCE, 1, "int8"), 96_000_000)
        assert served.cache.entries() == []
    assert not served.cache.in_use(KEY)


def test_another_model_in_the_middle_of_a_fetch_is_refused(tmp_path: Path) -> None:
    changed: list[Edge] = []

    def at(sent: int, chunk: pb.FileChunk) -> pb.FileChunk:
        if sent > 2_000_000:
            changed[0].service._description = with_model(OTHER, OTHER_SOURCE)
            raise UnreachableError("it was started again")
        return chunk

    with edge(tmp_path / "edge", service=tampering(at)) as served:
        changed.append(served)
        device = Device(tmp_path, served.address)
        with pytest.raises(
            RefusedError, match=rf"d asks for halves of source {SOURCE[:12]}, this edge has {OTHER_SOURCE[:12]} \(models/b\)"
        ):
            device.start()
    assert [entry.complete for entry in device.cache.entries()] == [False]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "causal-lm"}, SettingsError, "task is 'causal-lm' here and 'classification' at edge server edge"),
        ({"lora": {"rank": 8}}, SettingsError, "lora.rank is 8 here and 4 at edge server edge"),
        ({"lora": {"target_modules": ["v"]}}, SettingsError, "lora.target_modules is .* here and .* at edge server edge"),
        ({"cut": 4}, SettingsError, "its model has 4 blocks and it serves cuts from 1 to 3"),
        ({"precision": "nf4"}, SettingsError, "cannot provide nf4: choose fp32, bf16, int8, or install bitsandbytes there"),
        ({"cache_limit_mb": 5}, SettingsError, "raise `cache_limit_mb`"),
        ({"data": {"path": "no.log"}, "edge": "127.0.0.1:1"}, DataError, "no.log: there is no such file"),  # nobody is asked
    ],
)
def test_what_cannot_be_is_said_before_anything_is_fetched(
    served: Edge, tmp_path: Path, changes: dict[str, Any], error: type[SflError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Device(tmp_path, served.address, **changes).start()
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


def test_the_edge_s_settings_may_be_repeated(served: Edge, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 8, "target_modules": ["q", "k"]}
    assert Device(tmp_path, served.address, lora=lora, task="classification").start().lora.target_modules == ("k", "q")


def test_a_full_disk_is_said_before_anything_is_fetched(served: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(tmp_path, served.address)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 12_000_000))
    with pytest.raises(SettingsError, match=r"cut 2 in int8 of source c+ needs 16 MB more in .*/cache, and 12 MB are free"):
        device.start()
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []
    monkeypatch.undo()
    device.start()


def test_the_cache_keeps_to_its_limit(served: Edge, tmp_path: Path) -> None:
    device = Device(tmp_path, served.address, cache_limit_mb=12)
    for cut in (1, 2, 1, 3):
        device.start(cut=cut)
    assert [entry.key.cut for entry in device.cache.entries()] == [1, 3]


@pytest.mark.parametrize("name", ["../../outside.json", "/outside.json", "run.py"])
def test_a_hostile_file_list_writes_nothing(tmp_path: Path, name: str) -> None:
    class Hostile(ProvisioningService):
        async def Pack(self, request: pb.PackRequest, context: Any) -> AsyncIterator[pb.PackReply]:
            entry = pb.FileEntry(name=name, bytes=1, blocks=[bytes(32)])
            yield pb.PackReply(files=pb.FileList(block_bytes=BLOCK_BYTES, files=[entry]))

    with edge(tmp_path / "edge", service=Hostile) as served, pytest.raises(WireError, match="is no name of a model's file"):
        Device(tmp_path, served.address).start()
    assert not [path for path in tmp_path.rglob("*") if path.name in ("outside.json", "run.py")]


def test_a_damaged_copy_at_the_edge_is_never_used(tmp_path: Path) -> None:
    def at(sent: int, chunk: pb.FileChunk) -> pb.FileChunk:
        return pb.FileChunk(data=bytes(len(chunk.data)))

    with edge(tmp_path / "edge", service=tampering(at)) as served:
        device = Device(tmp_path, served.address)
        with pytest.raises(WireError, match=r"block 0 of model.safetensors arrived with another checksum .* 3 times now"):
            device.start()
    assert [entry.complete for entry in device.cache.entries()] == [False]


def test_an_edge_packs_once_and_again_when_its_copy_is_damaged(tmp_path: Path) -> None:
    for packings, name in ((1, "one"), (0, "two")):
        with edge(tmp_path / "edge") as served:
            Device(tmp_path / name, served.address).start()
            assert len(served.packed) == packings
    damage(served.cache.model(KEY) / "model.safetensors", 9)
    with edge(tmp_path / "edge") as served:
        device = Device(tmp_path / "three", served.address)
        device.start()
        assert served.packed == [KEY]
        assert same_files(device.cache.model(KEY), served.cache.model(KEY))


def test_a_half_that_an_edge_has_removed_is_packed_again(served: Edge, tmp_path: Path) -> None:
    Device(tmp_path / "one", served.address).start()
    shutil.rmtree(served.cache.folder)
    device = Device(tmp_path / "two", served.address)
    device.start()
    assert served.packed == [KEY, KEY]
    assert same_files(device.cache.model(KEY), served.cache.model(KEY))


def test_two_readers_of_a_half_that_was_removed_are_both_told_so(served: Edge, tmp_path: Path) -> None:
    """Both look for the file before either has noted that it is gone."""
    Device(tmp_path, served.address).start()
    shutil.rmtree(served.cache.folder / SOURCE)
    request = pb.ReadRequest(file="model.safetensors", length=1)

    async def both() -> list[Any]:
        return await asyncio.gather(*(served.service._open(KEY, request) for _ in range(2)), return_exceptions=True)

    errors = asyncio.run_coroutine_threadsafe(both(), served._loop).result(10)
    assert [type(error) for error in errors] == [UnreachableError, UnreachableError]


def test_the_edge_s_cache_keeps_to_its_limit(tmp_path: Path) -> None:
    with edge(tmp_path / "edge", limit_mb=12) as served:
        for cut in (1, 2, 3):
            Device(tmp_path / str(cut), served.address, cut=cut).start()
        assert sorted(entry.key.cut for entry in served.cache.entries()) == [2, 3]


def test_a_half_that_does_not_fit_is_not_packed_until_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with edge(tmp_path / "edge", limit_mb=6) as served:
        device = Device(tmp_path, served.address)
        other = HalfKey(SOURCE, 1, "int8")
        Device(tmp_path / "one", served.address, cut=1).start()
        reader = served.cache.try_lock(other, shared=True)
        assert reader is not None
        with reader, pytest.raises(RefusedError, match="halves in use take 6 of the 6 MB"):
            device.start()
        with monkeypatch.context() as patch, pytest.raises(RefusedError, match=r"needs 6 MB more in .*/edge, and 5 MB are free"):
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 5_000_000))
            device.start()
        assert served.packed == [other]
        assert not list((tmp_path / "edge").rglob("cut-2-int8*/model/*"))
        device.start()
        assert served.packed == [other, KEY]


def test_what_cannot_be_packed_is_refused_with_the_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def write(folder: Path, key: HalfKey) -> None:
        (folder / "half").write_text("")
        raise ModelError("a shard is missing")

    with edge(tmp_path / "edge", write=write) as served, pytest.raises(RefusedError, match="refused: a shard is missing"):
        Device(tmp_path, served.address).start()
    assert not list((tmp_path / "edge").rglob("half"))
    assert "a device's half is not provided: a shard is missing" in caplog.text


def test_a_slow_packing_is_not_silent_and_a_silent_edge_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(folder: Path, key: HalfKey) -> None:
        time.sleep(1.2)
        write_half(folder, key)

    monkeypatch.setattr("sfl.wire.provision.SILENCE_S", 0.5)
    monkeypatch.setattr("sfl.edge_server.provisioning.HEARTBEAT_S", 0.1)
    with edge(tmp_path / "edge", write=write) as served:
        Device(tmp_path / "one", served.address).start()
        monkeypatch.setattr("sfl.edge_server.provisioning.HEARTBEAT_S", 10)
        with pytest.raises(UnreachableError, match=r"the edge server was silent for 0\.5 s; gave up"):
            Device(tmp_path / "two", served.address, cut=1, give_up_s=0.3).start()


def test_an_edge_that_provides_nothing_says_so(tmp_path: Path) -> None:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> tuple[Any, str]:
        server, address = serve("127.0.0.1:0")
        await server.start()
        return server, address

    server, address = asyncio.run_coroutine_threadsafe(start(), loop).result(10)
    with contextlib.closing(loop):
        with pytest.raises(RefusedError, match="provides no model: set `model` here, or have it `provide` one"):
            Device(tmp_path, address).start()
        asyncio.run_coroutine_threadsafe(server.stop(0), loop).result(10)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def test_provisioning_imports_neither_torch_nor_numpy() -> None:
    script = (
        "import sys, sfl.device.provision, sfl.edge_server.provisioning, sfl.cli.cache;"
        "print(sorted({'torch', 'transformers', 'peft', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"
