"""Whether a Raspberry Pi holds itself back, now or at any time since it was started."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sfl.profiling.board.files import ROOT, found, number_in, text_of

# Bit n: it is so now; bit n + 16: it was so at some time since the start.
_BITS = {0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit"}
_SINCE_START = 16


@dataclass(frozen=True)
class Throttling:
    """What holds the board back `now` and what did `since_boot`, as words; `since_boot` is None where it is not measured.

    `bits` is the firmware's number, None where only the kernel's under-voltage alarm was there to be read.
    """

    bits: int | None
    now: tuple[str, ...]
    since_boot: tuple[str, ...] | None


def decode(bits: int) -> Throttling:
    """The words for the firmware's bits."""
    now = tuple(word for bit, word in _BITS.items() if bits >> bit & 1)
    since = tuple(word for bit, word in _BITS.items() if bits >> (bit + _SINCE_START) & 1)
    return Throttling(bits, now, since)


def vcgencmd() -> str | None:
    """What `vcgencmd get_throttled` prints; None where it is not installed or may not ask the firmware."""
    try:
        answer = subprocess.run(["vcgencmd", "get_throttled"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout


def throttling(root: Path = ROOT, ask_firmware: Callable[[], str | None] = vcgencmd) -> Throttling | None:
    """From the kernel's file, from the firmware, or the under-voltage alarm alone; None on other boards."""
    if "Raspberry Pi" not in (text_of(root / "proc/device-tree/model") or ""):
        return None
    for path in found(root, "sys/devices/platform/soc*/*firmware/get_throttled"):
        if (bits := _hexadecimal(text_of(path))) is not None:
            return decode(bits)
    if (bits := _hexadecimal(ask_firmware())) is not None:
        return decode(bits)
    for monitor in found(root, "sys/class/hwmon/hwmon*"):
        if text_of(monitor / "name") == "rpi_volt" and (alarm := number_in(monitor / "in0_lcrit_alarm")) is not None:
            return Throttling(None, (_BITS[0],) if alarm else (), None)
    return None


def _hexadecimal(text: str | None) -> int | None:
    """The number in `50005` (the kernel's file) or `throttled=0x50005` (vcgencmd)."""
    try:
        return int((text or "").strip().removeprefix("throttled="), 16)
    except ValueError:
        return None
