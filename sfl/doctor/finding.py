"""What one check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sfl.errors import SflError

State = Literal["passed", "warned", "failed", "skipped"]


@dataclass(frozen=True)
class Finding:
    """A line of the doctor's: what was looked at, what was found, and what to do about it where it did not pass."""

    state: State
    name: str
    found: str
    advice: str = ""
    error: str = ""  # number of the error that a daemon would end with


def passed(name: str, found: str) -> Finding:
    return Finding("passed", name, found)


def warned(name: str, found: str, advice: str) -> Finding:
    return Finding("warned", name, found, advice)


def failed(name: str, found: str, advice: str) -> Finding:
    return Finding("failed", name, found, advice)


def broke(name: str, error: SflError) -> Finding:
    """A check that ended with the error that a daemon would end with; its message says what to do."""
    return Finding("failed", name, str(error), see_page(error.code), error.code)


def see_page(code: str) -> str:
    """The advice to read about an error."""
    return f"sfl errors {code} says more"


def skipped(name: str, why: str) -> Finding:
    return Finding("skipped", name, why)
