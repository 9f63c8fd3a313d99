"""A file's text, checked, and the words for what is wrong with a line of it."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from sfl.errors import DataFileError, DataFormatError

Row = dict[str, "str | None"]
NumberedRow = tuple[int, Row]

SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "vertical bars", " ": "spaces"}

_BINARY = {
    b"\x1f\x8b": "compressed (gzip): unpack it first",
    b"PK\x03\x04": "a zip archive: unpack it first",
    b"\xff\xfe": "UTF-16: save it as UTF-8",
    b"\xfe\xff": "UTF-16: save it as UTF-8",
}


def require_file(path: Path) -> None:
    """Raise `DataError` unless there is a file and it may be read; what it holds is not looked at."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise DataFileError(f"{path}: there is no such file") from None
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise DataFileError(f"{path} is a directory: name a file with the examples")
    if not os.access(path, os.R_OK):
        raise DataFileError(f"{path} cannot be read: {os.strerror(errno.EACCES)}")


def read_text(path: Path) -> str:
    """The whole file as text, without a byte order mark. Raises `DataError` unless it is a non-empty UTF-8 text file."""
    require_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataFileError(f"{path} cannot be read: {error.strerror}") from error
    if not data.strip():
        raise DataFileError(f"{path} is empty: it must hold at least one example")
    for magic, advice in _BINARY.items():
        if data.startswith(magic):
            raise DataFileError(f"{path} is {advice}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise at_line(
            path, line_of(data, error.start), f"byte 0x{data[error.start]:02x} is not UTF-8: save the file as UTF-8"
        ) from None
    if "\0" in text:
        raise at_line(path, line_of(data, data.index(b"\0")), "a NUL byte: the file is not text, or was damaged")
    return text


def line_of(data: bytes, offset: int) -> int:
    """Number of the line, from 1, that holds the byte at `offset`."""
    return data.count(b"\n", 0, offset) + 1


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, numbered from 1, without their line ends (LF or CRLF)."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.removesuffix("\r")


def at_line(path: Path, line: int, problem: str) -> DataFormatError:
    """An error that names the place."""
    return DataFormatError(f"{path}, line {line}: {problem}")


def found_separator(line: str, but: str = "") -> str | None:
    """The most frequent of the usual separators in `line` other than `but`; None if it holds none."""
    counts = {separator: line.count(separator) for separator in SEPARATORS if separator != but}
    best = max(counts, key=lambda separator: counts[separator])
    return best if counts[best] else None


def wrong_field_count(path: Path, text: str, line: int, found: int, expected: int, separator: str) -> DataFormatError:
    """The error for a row of `found` fields where the header names `expected`, with the likeliest cause."""
    rest = text.split("\n")
    content = rest[line - 1]
    named = SEPARATORS.get(separator, repr(separator))
    other = found_separator(content, but=separator)
    if separator not in content and other and content.count(other) >= expected // 2:
        problem = f"the fields are separated by {SEPARATORS[other]}, but {named} were expected: convert them"
    elif found > expected:
        problem = f"{found} fields where the header names {expected}: is there a separator inside a value?"
    elif not any(later.strip() and not later.startswith("#") for later in rest[line:]):
        problem = f"the last row has {found} of {expected} fields: the file was cut off there; copy it again, or delete this line"
    else:
        problem = f"{found} fields where the header names {expected}, separated by {named}: repair or delete this line"
    return at_line(path, line, problem)
