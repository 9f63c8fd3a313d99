"""Tables with a header line: CSV with the usual quotes, and TSV, where a quote is a character like any other."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sfl.data.source import SEPARATORS, NumberedRow, at_line, found_separator, numbered_lines, wrong_field_count


def header_of(text: str) -> tuple[str, list[str]]:
    """The separator (tab or comma, whichever gives more columns) and the column names of the first line."""
    _, line = next(numbered_lines(text))
    separator = "\t" if line.count("\t") >= line.count(",") and "\t" in line else ","
    try:
        names = next(_rows(line, separator))
    except csv.Error:  # a quote is missing; the reader of the rows says so
        names = line.split(separator)
    return separator, [name.strip() for name in names]


def read_delimited(path: Path, text: str) -> Iterator[NumberedRow]:
    """Yield each row below the header with the number of its (last) line; values are as written, never None.

    Raises `DataError` for a header that is a single column though other separators are in it, for a column named twice or
    not at all, and for a row whose fields do not fit the header.
    """
    separator, names = header_of(text)
    first, line = next(numbered_lines(text))
    other = found_separator(line, but=separator)
    if len(names) == 1 and other:
        raise at_line(
            path,
            first,
            f"the header is separated by {SEPARATORS[other]}; tabs or commas were expected: convert the file, or set its format",
        )
    for name in names:
        if not name or names.count(name) > 1:
            what = f"column '{name}' is named twice" if name else "a column has no name"
            raise at_line(path, first, f"{what}: the first line must name the columns")
    rows = _rows(text, separator)
    header_seen = False
    try:
        for values in rows:
            if not any(value.strip() for value in values):
                continue
            if not header_seen:
                header_seen = True
                continue
            if len(values) != len(names):
                raise wrong_field_count(path, text, rows.line_num, len(values), len(names), separator)
            yield rows.line_num, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise at_line(path, rows.line_num, f"{error}: is a quote missing?") from None


def _rows(text: str, separator: str) -> Any:
    lines = io.StringIO(text, newline="")
    if separator == "\t":
        return csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=separator, strict=True)
