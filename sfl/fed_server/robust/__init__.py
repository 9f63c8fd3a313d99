"""Robust rules by name.

At an aggregation, after privacy's clipping and the strategy's weights, and before the merge:

    robust = make_robust(settings.robust)                   # None for no rule
    if isinstance(robust, Screening):                       # krum, multi-krum, norm-clip
        updates, weights = robust.screen(updates, weights)  # a `Screened`: which also says who was rejected and why
    elif isinstance(robust, Combining):                     # median, trimmed-mean, bulyan
        delta = robust.combine(updates, weights)            # to be merged as one update with the weight of all

A rule is not to be asked about fewer than `required(rule, attackers)` updates: the aggregation refuses such a pool. The rules
work on factors and head as they are submitted, so a combining rule goes with merges that add factors.
"""

from __future__ import annotations

from sfl.fed_server.robust.base import Combining, Robust, Screened, Screening, required
from sfl.fed_server.robust.coordinates import Bulyan, Median, TrimmedMean
from sfl.fed_server.robust.krum import Krum, MultiKrum
from sfl.fed_server.robust.norms import NormClip
from sfl.federation_settings import RobustSettings

__all__ = ["Combining", "Robust", "Screened", "Screening", "make_robust", "required"]

_RULES: dict[str, type[Robust]] = {rule.name: rule for rule in (Krum, MultiKrum, Bulyan, Median, TrimmedMean)}


def make_robust(settings: RobustSettings) -> Robust | None:
    """The rule that `settings` name, if any."""
    if settings.rule == "none":
        return None
    if settings.rule == NormClip.name:
        return NormClip(settings.attackers, settings.norm)
    return _RULES[settings.rule](settings.attackers)
