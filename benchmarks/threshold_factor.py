"""How far apart the performance trigger's uploads are under a factor on the thresholds, without and with it in the decay.

    python benchmarks/threshold_factor.py [--walks 20] [--steps 20000]

The logarithm of the loss is a random walk, in steps of a standard deviation of `--spread`. There is a new version every 60 steps,
from which it is measured anew, a look every 10 steps, and `min_steps` is 10, which the factor multiplies, too. The gradient
trigger never fires.
"""

from __future__ import annotations

import argparse
import math
from statistics import mean

import numpy as np

from sfl.device.trainer import Figures
from sfl.device.triggers import PerformanceTrigger
from sfl.federation_settings import StrategySettings

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
VERSION_EVERY, LOOK_EVERY, MIN_STEPS = 60, 10, 10


class FactorAlone(PerformanceTrigger):
    """The trigger as it would be if its threshold fell by `decay` whatever the factor."""

    def observe(self, figures: Figures, factor: float = 1.0) -> bool:
        decay, self._decay = self._decay, self._decay**factor
        fired = super().observe(figures, factor)
        self._decay = decay
        return fired


def distance(kind: type[PerformanceTrigger], factor: float, walk: list[float]) -> float:
    """Mean steps between two uploads along a walk of losses, one a step."""
    chosen = StrategySettings()
    trigger = kind("loss", chosen.threshold, chosen.threshold_growth, chosen.threshold_decay)
    least, since, unseen, uploads = math.ceil(factor * MIN_STEPS), 0, 0, 0
    for step, loss in enumerate(walk):
        figures = Figures(loss, 1, None, None)
        if step % VERSION_EVERY == 0:
            trigger.refer_to(figures)
        since, unseen = since + 1, unseen + 1
        if since >= least and unseen >= LOOK_EVERY:
            unseen = 0
            if trigger.observe(figures, factor):
                since, uploads = 0, uploads + 1
    return len(walk) / max(uploads, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--walks", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--spread", type=float, default=0.01)
    args = parser.parse_args()
    moves = np.random.default_rng(0).normal(0, args.spread, (args.walks, args.steps))
    walks = np.exp(np.cumsum(moves, axis=1)).tolist()
    print(f"{'f':28}", *(f"{factor:6g}" for factor in FACTORS))
    for name, kind in (("factor alone", FactorAlone), ("with the root in the decay", PerformanceTrigger)):
        print(f"{name:28}", *(f"{mean(distance(kind, factor, walk) for walk in walks):6.0f}" for factor in FACTORS), flush=True)


if __name__ == "__main__":
    main()
