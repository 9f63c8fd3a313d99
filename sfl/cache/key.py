"""What names a half: what it is packed from, the cut and the precision."""

from __future__ import annotations

import re
from typing import NamedTuple, get_args

from sfl.errors import WireError
from sfl.settings import Precision

_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_CUT = 10_000  # no model has as many blocks


class HalfKey(NamedTuple):
    """The first `cut` blocks, the embeddings and the tokenizer of a model, the blocks' weights in `precision`.

    `source` (SHA-256 in hex, see sfl/model/source.py) names the model with its configuration and tokenizer.
    """

    source: str
    cut: int
    precision: str

    @property
    def name(self) -> str:
        """The part after the source, as a folder is named."""
        return f"cut-{self.cut}-{self.precision}"

    def __str__(self) -> str:
        return f"cut {self.cut} in {self.precision} of source {self.source[:12]}"


def is_digest(text: str) -> bool:
    """Whether this is a SHA-256 in hex, as fingerprints and sources are."""
    return _DIGEST.fullmatch(text) is not None


def checked_key(source: str, cut: int, precision: str) -> HalfKey:
    """The key that came over the wire or from a folder's name. Raises `WireError` for one that names no half."""
    if not is_digest(source):
        raise WireError("a half's source is 64 hexadecimal digits; another one came")
    if not 1 <= cut <= MAX_CUT:
        raise WireError(f"there is no cut {cut}")
    if precision not in get_args(Precision):
        raise WireError(f"precision '{precision[:20]}' is unknown: {', '.join(get_args(Precision))} are known")
    return HalfKey(source, cut, precision)
