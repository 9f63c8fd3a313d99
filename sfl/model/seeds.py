"""Seeds for what is random while a half computes."""

from __future__ import annotations

import hashlib
from typing import Literal


def dropout_seed(seed: int, device: str, half: Literal["device", "edge"]) -> int:
    """Seed of the dropout in one half of `device`'s training, a signed 64-bit number.

    No two halves draw the same masks: neither those of one device nor those of devices with one `seed`.
    """
    digest = hashlib.sha256(f"{seed}/{device}/{half}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
