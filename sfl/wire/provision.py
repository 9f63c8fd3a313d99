"""What an edge server provides, as data, its form on the wire, and the edge server as a device without a model sees it.

Needs neither torch nor NumPy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

import grpc

from sfl.adapters.layout import LoraSpec
from sfl.cache.key import MAX_CUT, HalfKey, checked_key, is_digest
from sfl.cache.manifest import Manifest, StoredFile, check
from sfl.data.settings import Task
from sfl.errors import NotProvidedError, RefusedError, UnreachableError, WireError
from sfl.identity.node import Node
from sfl.v1 import provision_pb2 as pb
from sfl.v1.provision_pb2_grpc import ProvisioningStub
from sfl.v1.split_pb2 import Lora
from sfl.wire.channel import SILENCE_S, dial, error_from, until_silent

PEER = "the edge server"
CHUNK_BYTES = 512 * 1024
PACKING_S = 1800.0  # that an edge server takes at most to pack a half
_CALL_S = 60.0
_PACK_S = PACKING_S + 60
_MAX_RANK, _MAX_NAMES, _MAX_NAME = 10_000, 1_000, 1_000  # of a description, far beyond any model's

Reply = TypeVar("Reply", pb.Description, pb.PackReply, pb.FileChunk)


@dataclass(frozen=True)
class Description:
    """What an edge server trains; see `Description` in provision.proto. `config` is the model's configuration as a tree."""

    edge: str
    base_model: str
    fingerprint: str
    task: str
    lora: LoraSpec
    lowest_cut: int
    num_layers: int
    precisions: tuple[str, ...]
    config: dict[str, Any]
    source: str
    time: float = 0.0  # Unix time in seconds when it was told, by the edge server's clock


def description_to_wire(description: Description) -> pb.Description:
    lora = description.lora
    return pb.Description(
        edge=description.edge,
        base_model=description.base_model,
        model_fingerprint=description.fingerprint,
        task=description.task,
        lora=Lora(rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, target_modules=lora.target_modules),
        lowest_cut=description.lowest_cut,
        num_layers=description.num_layers,
        precisions=description.precisions,
        config=json.dumps(description.config),
        source=description.source,
    )


def description_from_wire(message: pb.Description) -> Description:
    """Raises `WireError` for what describes no model, or one in a way that only another version of sfl knows."""
    try:
        config = json.loads(message.config)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{PEER} described its model with a configuration that is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise WireError(f"{PEER} described its model with a configuration that is no JSON object")
    lora = message.lora
    described = Description(
        edge=message.edge,
        base_model=message.base_model,
        fingerprint=message.model_fingerprint,
        task=message.task,
        lora=LoraSpec(lora.rank, lora.alpha, lora.dropout, tuple(lora.target_modules)),
        lowest_cut=message.lowest_cut,
        num_layers=message.num_layers,
        precisions=tuple(message.precisions),
        config=config,
        source=message.source,
        time=message.time,
    )
    for wrong in _mistakes(described):
        raise WireError(f"{PEER} described its model with {wrong}: does it run the same version of sfl as this device?")
    return described


def _mistakes(described: Description) -> Iterator[str]:
    lora = described.lora
    if not is_digest(described.fingerprint) or not is_digest(described.source):
        yield "a fingerprint or a source that is no SHA-256"
    if described.task not in get_args(Task):
        yield f"the unknown task {described.task[:40]!a}"
    if not 1 <= lora.rank <= _MAX_RANK:
        yield f"LoRA rank {lora.rank}"
    if not 0 < lora.alpha < math.inf:
        yield f"LoRA alpha {lora.alpha}"
    if not 0 <= lora.dropout < 1:
        yield f"LoRA dropout {lora.dropout}"
    if not 1 <= described.lowest_cut < described.num_layers <= MAX_CUT:
        yield f"{described.num_layers} blocks and cuts from {described.lowest_cut} on"
    if not 1 <= len(lora.target_modules) <= _MAX_NAMES or not 1 <= len(described.precisions) <= _MAX_NAMES:
        yield f"{len(lora.target_modules)} modules that get LoRA and {len(described.precisions)} precisions"
    for name in (described.edge, described.base_model, *lora.target_modules, *described.precisions):
        if not 1 <= len(name) <= _MAX_NAME or not name.isprintable():
            yield f"the name {name[:40]!a} of {len(name)} characters"


def key_to_wire(key: HalfKey) -> pb.Half:
    return pb.Half(source=key.source, cut=key.cut, precision=key.precision)


def key_from_wire(half: pb.Half) -> HalfKey:
    """Raises `WireError` for one that names no half."""
    return checked_key(half.source, half.cut, half.precision)


def manifest_to_wire(manifest: Manifest) -> pb.FileList:
    files = [pb.FileEntry(name=file.name, bytes=file.size, blocks=file.blocks) for file in manifest.files]
    return pb.FileList(block_bytes=manifest.block_bytes, files=files)


def manifest_from_wire(files: pb.FileList) -> Manifest:
    """Raises `WireError` as `check` does: nothing in it can name a file elsewhere or of an absurd size."""
    stored = (StoredFile(file.name, file.bytes, tuple(file.blocks)) for file in files.files)
    return check(Manifest(files.block_bytes, tuple(stored)))


class ProvisioningClient:
    """Blocking calls, each made once: raises `RefusedError` with the edge's reason, or `UnreachableError` when trying again
    may help. `received` counts the bytes of all replies."""

    def __init__(self, address: str, device: str, wait_s: float, node: Node | None = None) -> None:
        self.received = 0
        self._device = device
        self._channel = dial(address, PEER, wait_s, node, "edge")
        self._stub = ProvisioningStub(self._channel)

    def describe(self) -> Description:
        """What the edge server trains. Raises `RefusedError` when it provides nothing."""
        try:
            return description_from_wire(
                self._count(self._call(lambda: self._stub.Describe(pb.DescribeRequest(device=self._device), timeout=_CALL_S)))
            )
        except RefusedError as error:
            if isinstance(error.__cause__, grpc.RpcError) and error.__cause__.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise NotProvidedError(f"{PEER} provides no model: set `model` here, or have it `provide` one") from error
            raise

    def pack(self, key: HalfKey) -> Manifest:
        """The files of a half, once the edge server has them, which may take it a minute more than `PACKING_S`."""
        request = pb.PackRequest(device=self._device, half=key_to_wire(key))
        for reply in self._stream(lambda: self._stub.Pack(request, timeout=_PACK_S)):
            if reply.WhichOneof("body") == "files":
                return manifest_from_wire(reply.files)
        raise UnreachableError(f"{PEER} ended the answer before it had listed the files of {key}")

    def read(self, key: HalfKey, file: str, offset: int, length: int) -> Iterator[bytes]:
        """`length` bytes of a file from `offset` on, in pieces. Raises `WireError` for more or fewer than that, or for an
        empty piece, of which there could be any number."""
        request = pb.ReadRequest(device=self._device, half=key_to_wire(key), file=file, offset=offset, length=length)
        left = length
        for chunk in self._stream(lambda: self._stub.Read(request)):
            if not chunk.data:
                raise WireError(f"{PEER} sent an empty piece of {file}")
            left -= len(chunk.data)
            if left < 0:
                break
            yield chunk.data
        if left:
            raise WireError(f"{PEER} sent {'more' if left < 0 else 'fewer'} bytes of {file} than the {length} asked for")

    def close(self) -> None:
        self._channel.close()

    def _stream(self, call: Callable[[], Any]) -> Iterator[Any]:
        """The replies of a streaming call, counted; it is cancelled when nobody wants more of them."""
        replies = call()
        try:
            for reply in until_silent(replies, PEER, SILENCE_S):
                yield self._count(reply)
        except grpc.RpcError as error:
            raise error_from(error, PEER) from error
        finally:
            replies.cancel()

    def _call(self, call: Callable[[], Reply]) -> Reply:
        try:
            return call()
        except grpc.RpcError as error:
            raise error_from(error, PEER) from error

    def _count(self, reply: Reply) -> Reply:
        self.received += reply.ByteSize()
        return reply
