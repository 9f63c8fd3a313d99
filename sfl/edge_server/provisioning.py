"""Gives devices what they lack: the description of the model, and the files of their halves, packed once and kept on disk."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar

import grpc
import grpc.aio

from sfl.cache.cache import HalfCache
from sfl.cache.key import HalfKey
from sfl.cache.lock import FileLock
from sfl.cache.manifest import Manifest
from sfl.edge_server.packing import Packer
from sfl.errors import ModelError, NotProvidedError, SflError, UnreachableError, WireError
from sfl.telemetry import MetricsWriter, log
from sfl.v1 import provision_pb2 as pb
from sfl.v1.provision_pb2_grpc import ProvisioningServicer
from sfl.v1.split_pb2 import Heartbeat
from sfl.wire.channel import HEARTBEAT_S
from sfl.wire.provision import CHUNK_BYTES, Description, description_to_wire, key_from_wire, manifest_to_wire
from sfl.wire.refusals import refuse

Result = TypeVar("Result")

_LOCK_WAIT_S, _LOCK_PAUSE_S = 1800.0, 0.2  # for another edge server on this machine that packs the same half
_THREADS = 2  # for the disk, so that these reads never wait for those of the training, nor those for them


class ProvisioningService(ProvisioningServicer):
    """Answers for the model of `description`. Halves are packed by `pack`, one at a time, and kept in `cache`."""

    def __init__(self, description: Description, cache: HalfCache, pack: Packer, metrics: MetricsWriter) -> None:
        self.bytes_sent = 0
        self._description = description
        self._cache = cache
        self._pack = pack
        self._metrics = metrics
        self._halves: dict[HalfKey, asyncio.Task[Manifest]] = {}  # whole ones and those on their way
        self._provided: FileLock | None = None  # from the first half on
        self._packing = asyncio.Semaphore(1)
        self._disk = ThreadPoolExecutor(_THREADS, "provisioning")

    async def Describe(
        self, request: pb.DescribeRequest, context: grpc.aio.ServicerContext[pb.DescribeRequest, pb.Description]
    ) -> pb.Description:
        reply = description_to_wire(self._description)
        reply.time = time.time()
        self.bytes_sent += reply.ByteSize()
        return reply

    async def Pack(
        self, request: pb.PackRequest, context: grpc.aio.ServicerContext[pb.PackRequest, pb.PackReply]
    ) -> AsyncIterator[pb.PackReply]:
        """Devices that ask for a half at once share one packing, which goes on when they hang up."""
        try:
            key = self._checked(request.device, request.half)
            half = self._halves.get(key)
            if half is None or (half.done() and (half.cancelled() or half.exception() is not None)):
                half = self._halves[key] = asyncio.create_task(self._whole(key))
                half.add_done_callback(_note_failure)
            while not (await asyncio.wait({half}, timeout=HEARTBEAT_S))[0]:
                yield pb.PackReply(heartbeat=Heartbeat())
            reply = pb.PackReply(files=manifest_to_wire(half.result()))
            self.bytes_sent += reply.ByteSize()
            yield reply
        except SflError as error:
            await _abort(context, error)
        except OSError as error:
            await _abort(context, ModelError(f"the half cannot be packed: {error}"))

    async def Read(
        self, request: pb.ReadRequest, context: grpc.aio.ServicerContext[pb.ReadRequest, pb.FileChunk]
    ) -> AsyncIterator[pb.FileChunk]:
        """While somebody reads a half it is not removed from the cache."""
        try:
            key = self._checked(request.device, request.half)
            with self._in_use(key), await self._open(key, request) as stream:
                left = request.length
                await self._on_disk(lambda: stream.seek(request.offset))
                try:
                    while left and (data := await self._on_disk(partial(stream.read, min(left, CHUNK_BYTES)))):
                        left -= len(data)
                        self.bytes_sent += len(data)
                        yield pb.FileChunk(data=data)
                finally:
                    self._metrics.write("provide", device=request.device, file=request.file, bytes=request.length - left)
        except SflError as error:
            await _abort(context, error)
        except OSError as error:
            await _abort(context, UnreachableError(f"the half cannot be read: {error}"))

    async def close(self) -> None:
        """End what is being packed, and provide nothing any more."""
        halves = list(self._halves.values())
        for half in halves:
            half.cancel()
        await asyncio.gather(*halves, return_exceptions=True)
        if self._provided is not None:
            self._provided.release()
        self._disk.shutdown(wait=False, cancel_futures=True)

    def _checked(self, device: str, half: pb.Half) -> HalfKey:
        key, own = key_from_wire(half), self._description
        if key.source != own.source:
            raise NotProvidedError(
                f"{device} asks for halves of source {key.source[:12]}, this edge has {own.source[:12]} ({own.base_model}):"
                " it was started again with another model, configuration or tokenizer; start the device again"
            )
        if not own.lowest_cut <= key.cut < own.num_layers:
            raise NotProvidedError(
                f"{device} asks for cut {key.cut}, this edge serves cuts from {own.lowest_cut} to {own.num_layers - 1}"
            )
        if key.precision not in own.precisions:
            raise NotProvidedError(f"{device} asks for {key.precision}, this edge can pack {', '.join(own.precisions)}")
        return key

    async def _whole(self, key: HalfKey) -> Manifest:
        """The half from the cache, if every byte of it is right, or else packed."""
        async with self._packing:
            with await self._lock(key):
                if self._provided is None:
                    self._provided = await self._on_disk(lambda: self._cache.provide(key.source))
                kept = await self._on_disk(lambda: self._cache.manifest(key))
                if kept is not None:
                    if not await self._on_disk(lambda: kept.gaps(self._cache.model(key))):
                        self._cache.touch(key)
                        return kept
                    log.warning("%s is damaged in the cache and packed again", key)
                started = time.monotonic()
                folder = await self._on_disk(lambda: self._empty(key))
                log.info("packing %s", key)
                try:
                    await self._pack(key, folder, lambda size: self._on_disk(lambda: self._require_room(key, size)))
                    manifest = await self._on_disk(lambda: self._finish(key, folder))
                except BaseException:
                    shutil.rmtree(folder, ignore_errors=True)
                    raise
        seconds = time.monotonic() - started
        log.info("packed %s: %.1f MB in %.1f s", key, manifest.size / 1e6, seconds)
        self._metrics.write("pack", cut=key.cut, precision=key.precision, bytes=manifest.size, seconds=round(seconds, 3))
        return manifest

    def _empty(self, key: HalfKey) -> Path:
        folder = self._cache.begin(key)
        for left_over in folder.iterdir():
            left_over.unlink()
        return folder

    def _require_room(self, key: HalfKey, size: int) -> None:
        self._cache.make_room(key, size)
        self._cache.require_disk(str(key), size)

    def _finish(self, key: HalfKey, folder: Path) -> Manifest:
        manifest = Manifest.of(folder)
        self._cache.make_room(key, manifest.size)
        self._cache.finish(key, manifest)
        return manifest

    async def _lock(self, key: HalfKey) -> FileLock:
        for _ in range(round(_LOCK_WAIT_S / _LOCK_PAUSE_S)):
            if (lock := self._cache.try_lock(key)) is not None:
                return lock
            await asyncio.sleep(_LOCK_PAUSE_S)
        raise UnreachableError(f"another process has held {key} in the edge server's cache for {_LOCK_WAIT_S:g} s")

    def _in_use(self, key: HalfKey) -> FileLock:
        lock = self._cache.try_lock(key, shared=True)
        if lock is None:
            raise UnreachableError(f"{key} is just being packed: ask for its files first")
        return lock

    async def _open(self, key: HalfKey, request: pb.ReadRequest) -> BinaryIO:
        half = self._halves.get(key)
        if half is None or not half.done() or half.cancelled() or half.exception() is not None:
            raise UnreachableError(f"{key} is not packed yet: ask for its files first")
        file = next((file for file in half.result().files if file.name == request.file), None)
        if file is None or request.offset + request.length > file.size:
            raise WireError(f"{key} has no file {request.file[:100]!a} of {request.offset + request.length} bytes")
        path = self._cache.model(key) / file.name
        try:
            return await self._on_disk(lambda: path.open("rb"))
        except FileNotFoundError:
            if self._halves.get(key) is half:  # and not packed again since, or found missing by another reader
                del self._halves[key]
            raise UnreachableError(f"{key} was removed from the edge server's cache: ask for its files again") from None

    async def _on_disk(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._disk, work)


def _note_failure(half: asyncio.Task[Manifest]) -> None:
    if not half.cancelled() and (error := half.exception()) is not None:
        log.error("a device's half is not provided: %s", error)


async def _abort(context: grpc.aio.ServicerContext[Any, Any], error: SflError) -> NoReturn:
    """End a call: UNAVAILABLE where the device should try again, a refusal otherwise."""
    code = grpc.StatusCode.FAILED_PRECONDITION
    if isinstance(error, UnreachableError):
        code = grpc.StatusCode.UNAVAILABLE
    elif isinstance(error, WireError):
        code = grpc.StatusCode.INVALID_ARGUMENT
    await refuse(context, code, error)
