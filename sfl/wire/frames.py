"""Messages that carry tensors, cut into frames small enough for any gRPC setting and put together again.

A message goes out as one frame with the tensors' headers, then their bytes as chunks; see proto/sfl/v1/tensor.proto.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from sfl.errors import LimitError, WireError
from sfl.v1.federation_pb2 import AdapterMessage
from sfl.v1.split_pb2 import DeviceMessage, EdgeMessage
from sfl.wire.tensors import RawTensor, check_header

CHUNK_BYTES = 512 * 1024  # 256 KB to 1 MB is fastest; 64 KB is 2 to 3 times slower, 16 MB in one piece 4 times
MAX_MESSAGE_BYTES = 8 * 2**30
MAX_TENSORS = 100_000

Frame = TypeVar("Frame", DeviceMessage, EdgeMessage, AdapterMessage)


class Traffic:
    """Bytes of serialised frames sent and received so far, by any number of threads."""

    def __init__(self) -> None:
        self.sent = 0
        self.received = 0
        self._lock = threading.Lock()

    def add(self, sent: int = 0, received: int = 0) -> None:
        with self._lock:
            self.sent += sent
            self.received += received


def frames(message: Frame, tensors: Sequence[RawTensor], traffic: Traffic) -> Iterator[Frame]:
    """The frames of one message: itself with the headers of `tensors`, then their bytes in chunks. Counts what it yields."""
    message.tensors.extend(tensor.header() for tensor in tensors)
    traffic.add(sent=message.ByteSize())
    yield message
    for chunk in _chunks(tensors):
        frame = type(message)(chunk=chunk)
        traffic.add(sent=frame.ByteSize())
        yield frame


def _chunks(tensors: Sequence[RawTensor]) -> Iterator[bytes]:
    pending: list[memoryview] = []
    room = CHUNK_BYTES
    for tensor in tensors:
        rest = memoryview(tensor.data).cast("B")
        while rest.nbytes:
            pending.append(rest[:room])
            rest = rest[room:]
            room -= pending[-1].nbytes
            if room == 0:
                yield b"".join(pending)
                pending, room = [], CHUNK_BYTES
    if pending:
        yield b"".join(pending)


class Assembler(Generic[Frame]):
    """Puts the frames of one stream together, in the order of their arrival.

    `max_bytes` bounds the tensors of one message, by the setting `limit` if there is one; both may be changed between two
    messages.
    """

    def __init__(self, traffic: Traffic, max_bytes: int = MAX_MESSAGE_BYTES, limit: str = "") -> None:
        self._traffic = traffic
        self.max_bytes = max_bytes
        self.limit = limit
        self._message: Frame | None = None
        self._buffers: list[bytearray] = []  # they grow as bytes arrive: an announcement alone takes no memory
        self._tensor = 0  # index of the tensor that is being filled

    def feed(self, frame: Frame) -> tuple[Frame, list[RawTensor]] | None:
        """Take one frame; return the whole message with its tensors once its last byte is there, else None.

        Raises `WireError` for a header that cannot be, for more bytes than announced and for a message that begins
        before the last one is complete, `LimitError` for one that goes over the setting.
        """
        self._traffic.add(received=frame.ByteSize())
        if frame.WhichOneof("body") == "chunk":
            self._fill(memoryview(frame.chunk))
        else:
            self._begin(frame)
        return self._complete()

    @property
    def incomplete(self) -> bool:
        """Whether a message has begun whose last byte is not there yet."""
        return self._message is not None

    def _begin(self, message: Frame) -> None:
        if self._message is not None:
            raise WireError(f"a new message began when bytes of '{self._message.WhichOneof('body')}' were still due")
        if message.WhichOneof("body") is None:
            raise WireError("an empty message arrived; does the peer run a newer version?")
        if len(message.tensors) > MAX_TENSORS:
            raise WireError(f"a message announces {len(message.tensors)} tensors, more than {MAX_TENSORS}")
        for header in message.tensors:
            check_header(header)
        announced = sum(header.byte_length for header in message.tensors)
        if announced > self.max_bytes and self.limit:
            raise LimitError(
                f"a message announces {announced} bytes, above {self.limit} ({self.max_bytes} bytes): raise that, or send less"
            )
        if announced > self.max_bytes:
            raise WireError(f"a message announces {announced} bytes, more than the {self.max_bytes} allowed here")
        self._message = message
        self._buffers = [bytearray() for _ in message.tensors]
        self._tensor = 0

    def _fill(self, chunk: memoryview) -> None:
        while chunk.nbytes:
            due = self._due()
            if not due:
                raise WireError("more bytes arrived than were announced")
            part = chunk[:due]
            self._buffers[self._tensor] += part
            chunk = chunk[part.nbytes :]

    def _due(self) -> int:
        """Bytes that are still missing of the tensor that is being filled; 0 when nothing is."""
        while self._message is not None and self._tensor < len(self._buffers):
            due = self._message.tensors[self._tensor].byte_length - len(self._buffers[self._tensor])
            if due:
                return due
            self._tensor += 1
        return 0

    def _complete(self) -> tuple[Frame, list[RawTensor]] | None:
        if self._message is None or self._due():
            return None
        message, buffers = self._message, self._buffers
        self._message, self._buffers = None, []
        return message, [
            RawTensor(header.name, header.dtype, tuple(header.shape), buffer) for header, buffer in zip(message.tensors, buffers)
        ]
