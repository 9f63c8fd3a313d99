"""SplitLoRA (arXiv 2407.00952) as a baseline: one adapter at the edge for all devices, and the devices' averaged in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sfl.adapters.state import AdapterState
from sfl.fed_server.strategies.base import Rounds
from sfl.fed_server.updates import Update
from sfl.v1 import federation_pb2 as pb


class SplitLora(Rounds):
    """Rounds; of each layer there is a copy on every device that holds it, and one at the edge for all the others.

    The policy has the edge train its half in one set of parameters, stepped in turn by all devices, so what arrives as their
    edge halves are pieces of one copy's progress, and add up. Layer by layer, with a_k = |D_k| / |D| of the devices in the
    pool, and E those whose cut is at the layer or below it:

        theta <- theta + sum over k not in E of a_k delta theta_k + (sum over k in E of a_k) * sum over k in E of delta theta_k

    So each copy counts by the examples behind it. With one cut for all, that is the average below it and the plain sum above
    it, as in SplitLoRA; with mixed cuts a layer may have copies on devices and at the edge. There is one edge server: of two,
    each with a copy, the pieces would add up as if they were one's, so a second one cannot join.
    """

    shared_edge_adapter = True

    def _rule(self, size: float) -> pb.UploadPolicy:
        policy = super()._rule(size)
        policy.shared_edge_adapter = self.shared_edge_adapter
        return policy

    def prepare(self, updates: Sequence[Update], weights: Mapping[str, float]) -> list[Update]:
        """Each update with its edge half multiplied so that its weight becomes that of the layer's copy at the edge."""
        cuts = {update.device: update.cut for update in updates}

        def behind(layer: int) -> float:
            return sum(weights[device] for device in sorted(cuts) if cuts[device] <= layer)

        def scaled(update: Update) -> Update:
            def change(delta: AdapterState) -> AdapterState:
                return {
                    key: value if key.layer < update.cut else value * (behind(key.layer) / weights[update.device])
                    for key, value in delta.items()
                }

            return update.changed(change)

        return [scaled(update) for update in updates]
