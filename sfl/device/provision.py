"""A device without a model: what its edge server trains, and the device's half, from there or from the cache on disk.

Nothing here needs torch or NumPy.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sfl.cache.cache import HalfCache, default_folder
from sfl.cache.edges import KnownEdges, Provided
from sfl.cache.key import HalfKey
from sfl.cache.lock import FileLock
from sfl.cache.manifest import Gap, Manifest
from sfl.data.source import require_file
from sfl.device.fit import fitted
from sfl.errors import DamagedModelError, EdgeMismatchError, ModelChangedError, UnreachableError, WaitedError, WireError
from sfl.settings import DeviceSettings, LoraSettings
from sfl.telemetry import MetricsWriter, log
from sfl.wire.own import node_of
from sfl.wire.provision import Description, ProvisioningClient

Result = TypeVar("Result")

_SAY_EVERY_S, _LOCK_PAUSE_S = 5.0, 0.1
_DAMAGED_AGAIN = 3  # times that a block may arrive, or be found on the disk, with another checksum than announced
_SPARE_DISK = 10_000_000  # bytes that are left free

_in_use: list[FileLock] = []  # until this process ends or releases them, so that nobody removes its half


def provided(settings: DeviceSettings) -> DeviceSettings:
    """The settings in force, before anything large is imported: `fitted` to this machine's memory.

    Where they name no model, task and LoRA settings are those of the edge server's description, and the model is this device's
    half in the cache, fetched as far as it was not there.

    Raises `SettingsError` where the settings contradict the edge's, for a cut it cannot have, a disk that is full or a half
    above `cache_limit_mb`; `DataError` for data that are not there; `ModelError` when the edge server provides another model
    than before; `RefusedError` and `UnreachableError` as the edge answers or does not, the latter after `give_up_s` seconds
    without a byte.
    """
    if settings.model is not None:
        return fitted(settings, settings.model)
    require_file(settings.data.path)
    started = time.monotonic()
    cache = HalfCache(settings.cache or default_folder("device"), settings.cache_limit_mb)
    client = ProvisioningClient(settings.edge, settings.name, settings.wait_s, node_of(settings, "device"))
    try:
        description = _persist(client.describe, lambda: 0, settings.give_up_s)
        log.info("edge server %s trains %s, %s", description.edge, description.base_model, description.task)
        settings = with_cut(agreed(settings, description), description)
        cut = int(settings.cut)
        _require_same_model(settings.edge, description, cache)
        key = HalfKey(description.source, cut, settings.precision)
        size, fetched = _Fetch(client, cache, key, settings).whole()
    finally:
        client.close()
    KnownEdges(cache.folder).remember(
        settings.edge, Provided(description.base_model, description.fingerprint, description.source)
    )
    seconds = time.monotonic() - started
    log.info("%s: %.1f MB, of which %.1f MB were in the cache", key, size / 1e6, (size - fetched) / 1e6)
    with MetricsWriter(settings.out / "metrics.jsonl") as metrics:
        metrics.write(
            "provision",
            cut=cut,
            precision=settings.precision,
            bytes=size,
            bytes_received=client.received,
            bytes_cached=size - fetched,
            seconds=round(seconds, 3),
        )
    return settings.model_copy(update={"model": str(cache.model(key))})


def agreed(settings: DeviceSettings, description: Description) -> DeviceSettings:
    """The settings with the task and the LoRA settings of the edge. Raises `SettingsError` where one is set here, and differs."""
    lora = _agreed_lora(settings, description)
    _require_task(settings, description)
    return settings.model_copy(update={"task": description.task, "lora": lora})


def with_cut(settings: DeviceSettings, description: Description) -> DeviceSettings:
    """`fitted` to what the edge says of the model. Raises `SettingsError` for a cut or a precision that cannot be."""
    if settings.cut != "auto" and not description.lowest_cut <= settings.cut < description.num_layers:
        raise EdgeMismatchError(
            f"cut {settings.cut} does not go with edge server {description.edge}: its model has {description.num_layers} blocks"
            f" and it serves cuts from {description.lowest_cut} to {description.num_layers - 1}"
        )
    if settings.precision not in description.precisions:
        raise EdgeMismatchError(
            f"edge server {description.edge} cannot provide {settings.precision}: choose {', '.join(description.precisions)}"
            + (", or install bitsandbytes there" if settings.precision == "nf4" else "")
        )
    return fitted(settings, description.config, description.lowest_cut)


def release_halves() -> None:
    """Say that this process uses no half any more, before its end."""
    while _in_use:
        _in_use.pop().release()


def _require_task(settings: DeviceSettings, description: Description) -> None:
    if "task" in settings.model_fields_set and settings.task != description.task:
        raise EdgeMismatchError(
            f"task is '{settings.task}' here and '{description.task}' at edge server {description.edge}: leave it out here"
        )


def _agreed_lora(settings: DeviceSettings, description: Description) -> LoraSettings:
    """The edge's LoRA settings. Raises `SettingsError` where one is set here, and differently."""
    theirs = description.lora
    agreed = LoraSettings(
        rank=theirs.rank, alpha=theirs.alpha, dropout=theirs.dropout, target_modules=tuple(theirs.target_modules)
    )
    for name in sorted(settings.lora.model_fields_set):
        mine, other = getattr(settings.lora, name), getattr(agreed, name)
        if name == "target_modules":  # which the edge has spelt out
            if mine in ((), ("all-linear",)):
                continue
            mine = tuple(sorted(set(mine)))
        if mine != other:
            raise EdgeMismatchError(
                f"lora.{name} is {mine} here and {other} at edge server {description.edge}: leave it out here, or change one"
            )
    return agreed


def _require_same_model(address: str, description: Description, cache: HalfCache) -> None:
    before = KnownEdges(cache.folder).all().get(address)
    if before is not None and before.fingerprint != description.fingerprint:
        raise ModelChangedError(
            f"the edge server at {address} provided model {before.fingerprint[:12]} ({before.base_model}) before and now has"
            f" {description.fingerprint[:12]} ({description.base_model}): if that is intended, run"
            f" `sfl cache clear --edge {address} --cache {cache.folder}` and start again"
        )
    if before is not None and before.source != description.source:
        log.warning(
            "the edge server at %s has another configuration, tokenizer or pack format than before: fetching its half anew",
            address,
        )


class _Fetch:
    """Gets one half into the cache."""

    def __init__(self, client: ProvisioningClient, cache: HalfCache, key: HalfKey, settings: DeviceSettings) -> None:
        self._client = client
        self._cache = cache
        self._key = key
        self._settings = settings
        self._fetched = 0  # bytes of files
        self._damaged = 0
        self._wrong: int | None = None  # when the half that was last found damaged had been finished

    def whole(self) -> tuple[int, int]:
        """Once the half is in the cache, every byte checked, and in use by this process: its bytes, and those fetched.

        Where other processes fetch it or use it, they are waited for at most `join_wait_s` seconds (`UnreachableError`).
        """
        fetches, began = 0, time.monotonic()
        said = began
        while (size := self._used()) is None:
            lock = self._cache.try_lock(self._key)
            if lock is None:
                now = time.monotonic()
                if now - began > self._settings.join_wait_s:
                    raise WaitedError(
                        f"waited {now - began:.0f} s for {self._key} in {self._cache.folder}, which is not whole and which"
                        " another process has taken; gave up"
                    )
                if now - said > _SAY_EVERY_S:
                    said = now
                    log.info("waiting for another process that fetches or uses %s (%.0f s)", self._key, now - began)
                time.sleep(_LOCK_PAUSE_S)
                continue
            with lock:
                if self._cache.finished(self._key) not in (None, self._wrong):
                    continue  # fetched by another process a moment ago
                if fetches == _DAMAGED_AGAIN:
                    raise DamagedModelError(
                        f"{self._key} is damaged whenever it was fetched to {self._cache.folder}: is the disk in order?"
                    )
                if self._cache.manifest(self._key) is not None:
                    log.warning("%s is damaged in the cache: fetching what is wrong", self._key)
                _persist(self._complete, lambda: self._fetched, self._settings.give_up_s)
                fetches, began = fetches + 1, time.monotonic()
        return size, self._fetched

    def _used(self) -> int | None:
        """The bytes of the half, in use from now on; None where it is not whole or is being written."""
        lock = self._cache.try_lock(self._key, shared=True)
        if lock is None:
            return None
        finished = self._cache.finished(self._key)
        if finished is not None and finished != self._wrong:  # what was found wrong is not read again
            manifest = self._cache.manifest(self._key)
            if manifest is not None and not manifest.gaps(self._cache.model(self._key)):
                self._cache.touch(self._key)
                _in_use.append(lock)
                return manifest.size
            self._wrong = finished
        lock.release()
        return None

    def _complete(self) -> None:
        """Fetch what is missing and make the half complete; to be called again when the connection broke."""
        manifest = self._client.pack(self._key)
        folder = self._cache.begin(self._key)
        for stray in {path.name for path in folder.iterdir()} - {file.name for file in manifest.files}:
            (folder / stray).unlink()
        gaps = manifest.gaps(folder)
        missing = sum(gap.length for gap in gaps)
        self._cache.make_room(self._key, manifest.size)
        if missing:
            self._cache.require_disk(str(self._key), missing + _SPARE_DISK)
        progress = _Progress(manifest.size, manifest.size - missing)
        for gap in gaps:
            self._fill(manifest, gap, folder, progress)
        self._cache.finish(self._key, manifest)

    def _fill(self, manifest: Manifest, gap: Gap, folder: Path, progress: _Progress) -> None:
        """Fetch a gap, writing each block once its checksum is right."""
        path = folder / gap.file.name
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        with os.fdopen(descriptor, "r+b") as stream:
            stream.truncate(min(path.stat().st_size, gap.file.size))
            stream.seek(gap.offset)
            offset, block = gap.offset, bytearray()
            for data in self._client.read(self._key, gap.file.name, gap.offset, gap.length) if gap.length else ():
                block += data
                while block and (len(block) >= manifest.block_bytes or offset + len(block) == gap.offset + gap.length):
                    done = bytes(block[: manifest.block_bytes])
                    self._require_block(gap, offset // manifest.block_bytes, done)
                    stream.write(done)
                    offset += len(done)
                    del block[: len(done)]
                    self._fetched += len(done)
                    progress.add(len(done))

    def _require_block(self, gap: Gap, index: int, block: bytes) -> None:
        if hashlib.sha256(block).digest() == gap.file.blocks[index]:
            return
        self._damaged += 1
        what = f"block {index} of {gap.file.name} arrived with another checksum than was announced"
        if self._damaged < _DAMAGED_AGAIN:
            raise UnreachableError(what)
        raise WireError(f"{what}, {self._damaged} times now: the edge server's copy is damaged; start it again, it packs anew")


class _Progress:
    """Says now and then how far a fetch is."""

    def __init__(self, size: int, there: int) -> None:
        self._size = size
        self._there = there
        self._fetched = 0
        self._started = self._said = time.monotonic()

    def add(self, count: int) -> None:
        self._fetched += count
        now = time.monotonic()
        if now - self._said >= _SAY_EVERY_S:
            self._said = now
            rate = self._fetched / (now - self._started)
            done = (self._there + self._fetched) / 1e6
            log.info("fetched %.1f of %.1f MB, %.2f MB/s", done, self._size / 1e6, rate / 1e6)


def _persist(work: Callable[[], Result], progress: Callable[[], int], give_up_s: float) -> Result:
    """Do `work` again whenever the connection breaks; each time is logged, the pauses grow to 5 s.

    Raises `UnreachableError` once it has failed for `give_up_s` seconds without any growth of `progress`.
    """
    failing, pause, reached = 0.0, 0.2, -1
    while True:
        try:
            return work()
        except UnreachableError as error:
            if progress() > reached:
                failing, pause, reached = time.monotonic(), 0.2, progress()
            gone = time.monotonic() - failing
            if gone + pause > give_up_s:
                raise UnreachableError(f"{error}; gave up after {gone:.0f} s") from error
            log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause)
        pause = min(pause * 2, 5.0)
