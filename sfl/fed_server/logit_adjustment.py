"""What unequal labels do to local training, and what is added to each device's logits against it.

A device that has mostly one label learns first of all to answer with it, and its update is mostly that. Logit adjustment
(Menon et al. 2021; in federations Zhang et al. 2022) lets its loss know what its labels are like, so that they teach it nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log


def logit_offsets(
    counts: Mapping[str, Mapping[str, int]], labels: Sequence[str], strength: float = 1.0
) -> dict[str, tuple[float, ...]]:
    """For each device, what is added to the logit of each of `labels` in its training loss, from its `counts` of examples:

        log p_k(y) - log q(y), with p_k(y) = s (n_k(y) + q(y)) / (n_k + 1) + (1 - s) q(y)

    With `strength` s = 1, p_k are the shares of the labels on device k, with one example more that is divided as q, so that a
    label that it lacks has one; q are those on all devices. By Bayes' rule, where the devices' texts of one label are alike,
    p_k(y | x) is in proportion to q(y | x) p_k(y) / q(y): the logits that are best for all devices' examples are, with the
    offsets, best for each device's own. Where the texts are not alike, as where each device sees traffic of its own kind, what
    device a text comes from tells its label, and so much adjustment hides it: a smaller s leaves a part of it. A label that no
    device has is left alone.
    """
    everywhere = {label: sum(own.get(label, 0) for own in counts.values()) for label in labels}
    total = sum(everywhere.values())

    def offset(own: Mapping[str, int], label: str) -> float:
        if not everywhere[label]:
            return 0.0
        share = everywhere[label] / total
        here = (own.get(label, 0) + share) / (sum(own.values()) + 1)
        return log(strength * here + (1 - strength) * share) - log(share)

    return {device: tuple(offset(own, label) for label in labels) for device, own in counts.items()}
