"""Every error that a user can cause or meet, by kind.

A message names what was wrong and what to do about it; the command line prints it without a traceback.
"""

from __future__ import annotations


class SflError(Exception):
    """Base of all errors that `sfl` raises on purpose."""


class SettingsError(SflError):
    """A configuration file, an environment variable or a flag is wrong."""


class DataError(SflError):
    """A data file is missing, empty, truncated or not in the format it claims."""


class ModelError(SflError):
    """A model cannot be loaded, cut or adapted as asked."""


class AdapterError(SflError):
    """An adapter's keys, shapes or values do not fit what they are to be combined with."""


class UpdateError(AdapterError):
    """The update of one device cannot be used; those of others can."""

    def __init__(self, device: str, reason: str) -> None:
        super().__init__(reason)
        self.device = device


class WireError(SflError):
    """A message arrived that its receiver cannot accept: wrong dtype, shape, length, value or order."""


class RefusedError(SflError):
    """A peer refused a request; the message is the peer's own reason."""


class UnreachableError(SflError):
    """A peer did not answer within the time set for it."""
