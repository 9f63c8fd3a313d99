"""Which submissions have been settled, in little memory: a device numbers them, so they are runs of numbers."""

from __future__ import annotations

from typing import NamedTuple

_DIGITS = 18  # of a number that someone may have counted to


class _Run(NamedTuple):
    """Numbers from `first` to `last`, both included."""

    first: int
    last: int


class Seen:
    """Remembers submissions by device and id. Ids like `SESSION/12` that come more or less in order take next to no memory,
    however many there are; of others each one is kept."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], _Run] = {}
        self._others: dict[tuple[str, str], set[int]] = {}  # numbers outside of their session's run
        self._odd: set[tuple[str, str]] = set()  # ids without a number

    def __contains__(self, key: tuple[str, str]) -> bool:
        numbered = _numbered(*key)
        if numbered is None:
            return key in self._odd
        session, number = numbered
        run = self._runs.get(session)
        return run is not None and (run.first <= number <= run.last or number in self._others.get(session, ()))

    def add(self, device: str, submission: str) -> None:
        numbered = _numbered(device, submission)
        if numbered is None:
            self._odd.add((device, submission))
            return
        session, number = numbered
        first, last = self._runs.get(session, _Run(number, number - 1))
        if first <= number <= last:
            return
        others = self._others.setdefault(session, set())
        others.add(number)
        while last + 1 in others:
            last += 1
            others.remove(last)
        while first - 1 in others:
            first -= 1
            others.remove(first)
        self._runs[session] = _Run(first, last)
        if not others:
            del self._others[session]


def _numbered(device: str, submission: str) -> tuple[tuple[str, str], int] | None:
    session, _, number = submission.rpartition("/")
    if number.isascii() and number.isdecimal() and len(number) <= _DIGITS and str(int(number)) == number:
        return (device, session), int(number)
    return None
