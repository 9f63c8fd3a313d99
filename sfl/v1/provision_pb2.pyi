from sfl.v1 import split_pb2 as _split_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("edge", "base_model", "model_fingerprint", "task", "lora", "lowest_cut", "num_layers", "precisions", "config", "source", "time")
    EDGE_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    LOWEST_CUT_FIELD_NUMBER: _ClassVar[int]
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    PRECISIONS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    edge: str
    base_model: str
    model_fingerprint: str
    task: str
    lora: _split_pb2.Lora
    lowest_cut: int
    num_layers: int
    precisions: _containers.RepeatedScalarFieldContainer[str]
    config: str
    source: str
    time: float
    def __init__(self, edge: _Optional[str] = ..., base_model: _Optional[str] = ..., model_fingerprint: _Optional[str] = ..., task: _Optional[str] = ..., lora: _Optional[_Union[_split_pb2.Lora, _Mapping]] = ..., lowest_cut: _Optional[int] = ..., num_layers: _Optional[int] = ..., precisions: _Optional[_Iterable[str]] = ..., config: _Optional[str] = ..., source: _Optional[str] = ..., time: _Optional[float] = ...) -> None: ...

class Half(_message.Message):
    __slots__ = ("source", "cut", "precision")
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    CUT_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    source: str
    cut: int
    precision: str
    def __init__(self, source: _Optional[str] = ..., cut: _Optional[int] = ..., precision: _Optional[str] = ...) -> None: ...

class PackRequest(_message.Message):
    __slots__ = ("device", "half")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HALF_FIELD_NUMBER: _ClassVar[int]
    device: str
    half: Half
    def __init__(self, device: _Optional[str] = ..., half: _Optional[_Union[Half, _Mapping]] = ...) -> None: ...

class PackReply(_message.Message):
    __slots__ = ("files", "heartbeat")
    FILES_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    files: FileList
    heartbeat: _split_pb2.Heartbeat
    def __init__(self, files: _Optional[_Union[FileList, _Mapping]] = ..., heartbeat: _Optional[_Union[_split_pb2.Heartbeat, _Mapping]] = ...) -> None: ...

class FileList(_message.Message):
    __slots__ = ("block_bytes", "files")
    BLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    block_bytes: int
    files: _containers.RepeatedCompositeFieldContainer[FileEntry]
    def __init__(self, block_bytes: _Optional[int] = ..., files: _Optional[_Iterable[_Union[FileEntry, _Mapping]]] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("name", "bytes", "blocks")
    NAME_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    name: str
    bytes: int
    blocks: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, name: _Optional[str] = ..., bytes: _Optional[int] = ..., blocks: _Optional[_Iterable[bytes]] = ...) -> None: ...

class ReadRequest(_message.Message):
    __slots__ = ("device", "half", "file", "offset", "length")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HALF_FIELD_NUMBER: _ClassVar[int]
    FILE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    device: str
    half: Half
    file: str
    offset: int
    length: int
    def __init__(self, device: _Optional[str] = ..., half: _Optional[_Union[Half, _Mapping]] = ..., file: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class FileChunk(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...
