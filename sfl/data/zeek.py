"""Zeek's own log format: `#` header lines that say how to read the rows below them.

The labelled captures (`conn.log.labeled`) join three values by three spaces in the last field,
`tunnel_parents   label   detailed-label`, in the header as in the rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sfl.data.source import SEPARATORS, NumberedRow, Row, at_line, found_separator, numbered_lines, wrong_field_count
from sfl.telemetry import log

JOINT = "   "
DIRECTIVES = ("#separator", "#set_separator", "#empty_field", "#unset_field", "#path", "#open", "#close", "#fields", "#types")


def read_zeek(path: Path, text: str) -> Iterator[NumberedRow]:
    """Yield each flow with its line number; an unset value is None, an empty one "", a set's elements are joined by ",".

    Logs that were joined end to end are read as one. Raises `DataError` for a missing or odd header, a row whose fields do
    not fit it, a number that is none, and a log that was cut off.
    """
    header = _Header()
    number, closed = 0, True
    for number, line in numbered_lines(text):
        if line.startswith("#"):
            header.read(path, number, line)
            closed = closed or line.startswith("#close")
        else:
            closed = False
            yield number, header.row(path, text, number, line)
    if not header.names:
        raise at_line(path, max(number, 1), "a Zeek log without a #fields line: the columns are not known; copy the whole log")
    if not text.endswith("\n") and not line.startswith("#"):
        raise at_line(
            path, number, "the last row has no line end, so the log was cut off: copy it again, or end the line if it is whole"
        )
    if not closed:
        log.warning("%s has no #close line after its last row: it is still written to, or rows are missing", path)


@dataclass
class _Header:
    separator: str = "\t"
    set_separator: str = ","
    empty: str = "(empty)"
    unset: str = "-"
    names: list[str] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    joined: bool = False

    def read(self, path: Path, number: int, line: str) -> None:
        """Take in one `#` line. Unknown ones are comments; `#close` may carry anything."""
        if line.startswith("#separator"):
            self.separator = _unescape(line.removeprefix("#separator").strip(" ")) or "\t"
            return
        name, *values = line.split(self.separator)
        known = next((directive for directive in DIRECTIVES if re.match(rf"{directive}\b", line)), None)
        if known in ("#fields", "#types") and (name != known or len(values) < 2):
            other = found_separator(line, but=self.separator)
            raise at_line(
                path,
                number,
                f"{known} is separated by {SEPARATORS[other] if other else 'nothing'}, but the log's separator is "
                f"{SEPARATORS.get(self.separator, repr(self.separator))}: was it converted by an editor?",
            )
        if name == "#fields":
            self.joined = JOINT in values[-1]
            self.names, self.types = _unjoin(values), []
            repeated = {name for name in self.names if self.names.count(name) > 1}
            if repeated:
                raise at_line(path, number, f"column {min(repeated)} is named twice")
        elif name == "#types":
            self.types = _unjoin(values)
            if len(self.types) != len(self.names):
                raise at_line(path, number, f"{len(self.types)} types for {len(self.names)} fields: the header is damaged")
        elif name == "#set_separator" and values:
            self.set_separator = values[0]
        elif name == "#empty_field" and values:
            self.empty = values[0]
        elif name == "#unset_field" and values:
            self.unset = values[0]

    def row(self, path: Path, text: str, number: int, line: str) -> Row:
        if not self.names:
            raise at_line(path, number, "a row before any #fields line: the columns are not known; copy the whole log")
        values = line.split(self.separator)
        if self.joined:
            values[-1:] = values[-1].split(JOINT)
        if len(values) != len(self.names):
            raise wrong_field_count(path, text, number, len(values), len(self.names), self.separator)
        row: Row = {
            name: None if value == self.unset else "" if value == self.empty else value
            for name, value in zip(self.names, values, strict=True)
        }
        for name, kind in zip(self.names, self.types, strict=False):
            value = row[name]
            if not value:
                continue
            check = _CHECKS.get(kind)
            if check is not None and not check(value):
                raise at_line(path, number, f"{name} is '{value}', which is no {kind}: the row is damaged; repair or delete it")
            if kind.startswith(("set[", "vector[")) and self.set_separator != ",":
                row[name] = value.replace(self.set_separator, ",")
        return row


def _unjoin(values: list[str]) -> list[str]:
    return [*values[:-1], *values[-1].split(JOINT)]


def _unescape(text: str) -> str:
    return re.sub(r"\\x([0-9a-fA-F]{2})", lambda match: chr(int(match[1], 16)), text)


def _is_real(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


_CHECKS: dict[str, Callable[[str], bool]] = {
    "count": str.isdecimal,
    "port": str.isdecimal,
    "time": _is_real,
    "interval": _is_real,
    "double": _is_real,
}
