"""Which devices that are present cannot be counted on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

_KEPT = 0.7  # weight of the past in the moving mean of a device's time between two uploads


@dataclass
class _Uploads:
    last: float  # clock's seconds
    usual_s: float | None = None  # between two uploads; None before the second
    failing: bool = False


class Reach:
    """Tells the devices that a quorum should not wait for, from when and how their uploads came.

    A device cannot be reached as long as its last upload had to be sent more than once, by its own account, or
    nothing has come from it for more than `overdue` times what usually lies between two of its uploads (0: however long that
    is). A device that has not uploaded twice yet is waited for. `clock` gives seconds that never go back.
    """

    def __init__(self, overdue: float, clock: Callable[[], float]) -> None:
        self._overdue = overdue
        self._clock = clock
        self._devices: dict[str, _Uploads] = {}

    def uploaded(self, device: str, failures: int) -> None:
        """Note an upload, and how many of its tries failed before this one."""
        now = self._clock()
        before = self._devices.get(device)
        if before is None:
            self._devices[device] = _Uploads(now, failing=bool(failures))
            return
        apart = now - before.last
        usual = apart if before.usual_s is None else _KEPT * before.usual_s + (1 - _KEPT) * apart
        self._devices[device] = _Uploads(now, usual, bool(failures))

    def resent(self, device: str) -> None:
        """Note that an upload came once more: the answer to it had been lost."""
        if device in self._devices:
            self._devices[device].failing = True

    def known(self) -> dict[str, tuple[float | None, bool]]:
        """Seconds that usually lie between two uploads of each device, and whether its last one failed."""
        return {device: (uploads.usual_s, uploads.failing) for device, uploads in self._devices.items()}

    def restore(self, known: Mapping[str, tuple[float | None, bool]]) -> None:
        """Go on with what an earlier server knew; each device's last upload counts as made just now."""
        self._devices = {device: _Uploads(self._clock(), usual_s, failing) for device, (usual_s, failing) in known.items()}

    def forget(self, device: str) -> None:
        """The device has joined anew: its times begin again."""
        self._devices.pop(device, None)

    def unreachable(self, devices: Collection[str]) -> set[str]:
        """Those of `devices` that cannot be reached."""
        return {device for device in devices if device in self._devices and self._lost(self._devices[device])}

    def _lost(self, uploads: _Uploads) -> bool:
        silent = self._clock() - uploads.last
        late = self._overdue > 0 and uploads.usual_s is not None and silent > self._overdue * uploads.usual_s
        return uploads.failing or late
