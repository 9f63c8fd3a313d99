"""What a daemon needs to go on after any end: tensors and a JSON document in one file, whole or not there.

The file is a safetensors file, the document in its metadata, followed by the SHA-256 of all bytes before it. After a power cut
there is the earlier file or the later one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sfl.disk import of_the_moment, replace_file
from sfl.errors import StateError, StateWriteError

Tensors = dict[str, npt.NDArray[Any]]
Document = dict[str, Any]

_DOCUMENT = "sfl"  # its key in the metadata
_SUM_BYTES = hashlib.sha256().digest_size


def write_state(path: Path, document: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]]) -> int:
    """Keep `document`, which must be JSON-serialisable, and `tensors` in `path`, whose folder is there; the file's bytes.

    When this returns the disk has it. Raises `StateWriteError` when it cannot be written, because the disk is full, say; the
    earlier file, if there is one, is untouched.
    """
    whole = {name: np.ascontiguousarray(value) if value.ndim else value for name, value in tensors.items()}
    data = save(whole, metadata={_DOCUMENT: json.dumps(document)})
    try:
        replace_file(path, data, hashlib.sha256(data).digest())
    except OSError as error:
        raise StateWriteError(
            f"cannot write {path}: {error.strerror or error}; what it held before is untouched: make room there"
        ) from error
    return len(data) + _SUM_BYTES


def read_state(path: Path) -> tuple[Document, Tensors]:
    """The document and the tensors of `path`.

    Raises `StateError` for a file that is missing, damaged, not to be read or another kind's, `OSError` for one that cannot be
    read for the moment: that says nothing of it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        if of_the_moment(error):
            raise
        raise StateError(f"{path} cannot be read: {error.strerror or error}") from error
    body, found = memoryview(data)[:-_SUM_BYTES], data[-_SUM_BYTES:]
    if hashlib.sha256(body).digest() != found:
        raise StateError(
            f"{path} is damaged, or was not written by sfl: its checksum is not that of its {len(data)} bytes; restore it from a"
            " backup, or delete it and go on without what it held"
        )
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        document = json.loads(header["__metadata__"][_DOCUMENT])
        tensors = load(bytes(body))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise StateError(f"{path} was not written by this version of sfl ({error!r}); delete it to go on without it") from error
    if not isinstance(document, dict):
        raise StateError(f"{path} holds no state of sfl's; delete it to go on without it")
    return document, tensors
