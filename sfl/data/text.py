"""Files of texts: `text;label` lines, JSON lines, and plain text with one example a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from sfl.data.source import SEPARATORS, NumberedRow, at_line, found_separator, numbered_lines


def read_semicolon(path: Path, text: str) -> Iterator[NumberedRow]:
    """Yield `text` and `label` of each line; the last `;` separates. A first line `text;label` is a header and skipped."""
    for index, (number, line) in enumerate(numbered_lines(text)):
        content, semicolon, label = (part.strip() for part in line.rpartition(";"))
        if index == 0 and (content.lower(), label.lower()) == ("text", "label"):
            continue
        if not semicolon:
            other = found_separator(line.strip(), but=" ")
            found = f" ({SEPARATORS[other]} are there)" if other else ""
            raise at_line(path, number, f"no ';' between text and label{found}: expected text;label on each line")
        if not content:
            raise at_line(path, number, "no text before the ';'")
        yield number, {"text": content, "label": label or None}


def read_jsonl(path: Path, text: str) -> Iterator[NumberedRow]:
    """Yield the object of each line; numbers become text, null and absent fields None."""
    for number, line in numbered_lines(text):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise at_line(
                path, number, f"not JSON at column {error.colno} ({error.msg}): expected one whole object a line"
            ) from None
        if not isinstance(value, dict):
            raise at_line(path, number, 'not a JSON object: expected a line such as {"text": "...", "label": "..."}')
        yield number, {str(name): _scalar(field) for name, field in value.items()}


def read_plain(path: Path, text: str) -> Iterator[NumberedRow]:
    """Yield each line that is not blank as one `text`."""
    for number, line in numbered_lines(text):
        yield number, {"text": line.strip()}


def _scalar(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)
