"""What is said at the start of settings that work, but perhaps not as whoever chose them thinks."""

from __future__ import annotations

import math

from sfl.fed_server.aggregation import Aggregation
from sfl.settings import FedSettings

_MUCH = 2.0  # times the noise of versions from all devices' updates; said in any case where each upload makes a version


def advice(settings: FedSettings, aggregation: Aggregation) -> list[str]:
    """A line for each such choice, with what to do."""
    devices, found = settings.devices, list[str]()
    fills_quorum = aggregation.strategy.least_updates(devices)
    least = max(fills_quorum, aggregation.least)
    noise = math.sqrt(devices / least)  # each version has the same, and there are devices / least times as many
    if settings.privacy.noise and (noise >= _MUCH or least == 1 < devices):
        found.append(
            f"privacy.noise is added to every version, and updates of {least} of {devices} devices make one: all in all that is"
            f" {noise:.1f} times the noise of versions from all devices' updates at the same epsilon; raise"
            f" {'strategy.buffer' if settings.strategy.name == 'fedbuff' else 'strategy.quorum'}"
        )
    if settings.strategy.reach and settings.strategy.quorum_of == "devices" and fills_quorum == 1:
        found.append(
            "strategy.reach has the quorum not count devices that cannot be reached, and here one upload fills it, so this"
            f" changes nothing: raise strategy.quorum above {1 / devices:.2g}, or leave strategy.reach out"
        )
    return found
