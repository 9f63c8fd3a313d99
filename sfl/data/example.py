"""One example, whatever file it came from."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A text with its class and time.

    `text` is what the model reads: the prompt of a flow, or the text of a text file. `label` is None where there is none,
    `time` Unix seconds or None. `key` is the hex SHA-256 of the content that decides the split: a flow's prompt without its
    class, or the text. Equal content has an equal key on every device.
    """

    text: str
    label: str | None
    time: float | None
    key: str


def content_key(content: str) -> str:
    """Hex SHA-256 of `content` in UTF-8."""
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
