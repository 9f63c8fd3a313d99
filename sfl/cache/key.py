"""What names a half: the model, the cut and the precision."""

from __future__ import annotations

import re
from typing import NamedTuple, get_args

from sfl.errors import WireError
from sfl.settings import Precision

_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
MAX_CUT = 10_000  # no model has as many blocks


class HalfKey(NamedTuple):
    """The first `cut` blocks and the embeddings of the model `fingerprint` (SHA-256 in hex), its weights in `precision`."""

    fingerprint: str
    cut: int
    precision: str

    @property
    def name(self) -> str:
        """The part after the fingerprint, as a folder is named."""
        return f"cut-{self.cut}-{self.precision}"

    def __str__(self) -> str:
        return f"cut {self.cut} in {self.precision} of model {self.fingerprint[:12]}"


def checked_key(fingerprint: str, cut: int, precision: str) -> HalfKey:
    """The key that came over the wire or from a folder's name. Raises `WireError` for one that names no half."""
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise WireError("a model's fingerprint is 64 hexadecimal digits; another one came")
    if not 1 <= cut <= MAX_CUT:
        raise WireError(f"there is no cut {cut}")
    if precision not in get_args(Precision):
        raise WireError(f"precision '{precision[:20]}' is unknown: {', '.join(get_args(Precision))} are known")
    return HalfKey(fingerprint, cut, precision)
