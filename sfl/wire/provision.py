"""What an edge server provides, as data, its form on the wire, and the edge server as a device without a model sees it.

Needs neither torch nor NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from sfl.adapters.layout import LoraSpec
from sfl.cache.key import HalfKey, checked_key
from sfl.cache.manifest import Manifest, StoredFile, check
from sfl.errors import RefusedError, UnreachableError, WireError
from sfl.v1 import provision_pb2 as pb
from sfl.v1.provision_pb2_grpc import ProvisioningStub
from sfl.v1.split_pb2 import Lora
from sfl.wire.channel import SILENCE_S, dial, error_from, until_silent

PEER = "the edge server"
CHUNK_BYTES = 512 * 1024
_CALL_S = 60.0

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
    )


def description_from_wire(message: pb.Description) -> Description:
    """Raises `WireError` for a fingerprint or configuration that is none."""
    checked_key(message.model_fingerprint, 1, "fp32")
    try:
        config = json.loads(message.config)
    except ValueError as error:
        raise WireError(f"{PEER} described its model with a configuration that is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise WireError(f"{PEER} described its model with a configuration that is no JSON object")
    lora = message.lora
    return Description(
        edge=message.edge,
        base_model=message.base_model,
        fingerprint=message.model_fingerprint,
        task=message.task,
        lora=LoraSpec(lora.rank, lora.alpha, lora.dropout, tuple(lora.target_modules)),
        lowest_cut=message.lowest_cut,
        num_layers=message.num_layers,
        precisions=tuple(message.precisions),
        config=config,
    )


def key_to_wire(key: HalfKey) -> pb.Half:
    return pb.Half(model_fingerprint=key.fingerprint, cut=key.cut, precision=key.precision)


def key_from_wire(half: pb.Half) -> HalfKey:
    """Raises `WireError` for one that names no half."""
    return checked_key(half.model_fingerprint, half.cut, half.precision)


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

    def __init__(self, address: str, device: str, wait_s: float) -> None:
        self.received = 0
        self._device = device
        self._channel = dial(address, PEER, wait_s)
        self._stub = ProvisioningStub(self._channel)

    def describe(self) -> Description:
        """What the edge server trains. Raises `RefusedError` when it provides nothing."""
        try:
            return description_from_wire(
                self._count(self._call(lambda: self._stub.Describe(pb.DescribeRequest(device=self._device), timeout=_CALL_S)))
            )
        except RefusedError as error:
            if isinstance(error.__cause__, grpc.RpcError) and error.__cause__.code() == grpc.StatusCode.UNIMPLEMENTED:
                raise RefusedError(f"{PEER} provides no model: set `model` here, or have it `provide` one") from error
            raise

    def pack(self, key: HalfKey) -> Manifest:
        """The files of a half, once the edge server has them."""
        for reply in self._stream(lambda: self._stub.Pack(pb.PackRequest(device=self._device, half=key_to_wire(key)))):
            if reply.WhichOneof("body") == "files":
                return manifest_from_wire(reply.files)
        raise UnreachableError(f"{PEER} ended the answer before it had listed the files of {key}")

    def read(self, key: HalfKey, file: str, offset: int, length: int) -> Iterator[bytes]:
        """`length` bytes of a file from `offset` on, in pieces. Raises `WireError` for more or fewer than that."""
        request = pb.ReadRequest(device=self._device, half=key_to_wire(key), file=file, offset=offset, length=length)
        left = length
        for chunk in self._stream(lambda: self._stub.Read(request)):
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
