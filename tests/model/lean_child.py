"""A process of its own for test_lean_imports.py: trains tiny device halves and prints what came of it, as JSON.

python -m tests.model.lean_child plain|lean FAMILY ...
"""

from __future__ import annotations

import json
import sys
from importlib import import_module

UNUSED = (
    *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp", "sympy", "scipy", "sklearn"),
    *("accelerate", "bitsandbytes", "jinja2", "PIL", "peft.tuners.loha", "transformers.quantizers.quantizer_awq"),
)


def train(family: str, steps: int = 3) -> list[str]:
    """The losses of a tiny half of this family with LoRA and dropout, to the bit."""
    import torch

    from sfl.adapters.layout import LoraSpec
    from sfl.model.cut import DeviceHalf
    from sfl.model.local_adapter import LocalAdapter
    from sfl.model.lora import inject_lora, resolve_targets
    from sfl.model.recompute import recompute_blocks
    from sfl.wire.split import OptimizerSpec
    from tests.tiny import tiny_batch, tiny_config, tiny_model

    config = tiny_config(family)
    half = DeviceHalf(tiny_model(config), 2)
    slots = inject_lora(half, resolve_targets(config, LoraSpec(4, 8.0, 0.1, ())))
    recompute_blocks(half)
    chance = torch.Generator().manual_seed(1)
    shapes = {key: slots.slots[key][0].get_parameter("weight").shape for key in sorted(slots.keys(2))}
    state = {key: (0.1 * torch.randn(shape, generator=chance)).numpy() for key, shape in shapes.items()}
    adapter = LocalAdapter(slots, state, 2, 0, OptimizerSpec("adamw", 0.01, decay_steps=5))
    adapter.mount()
    half.train()
    torch.manual_seed(2)
    losses = []
    for step in range(steps):
        loss = half(*tiny_batch(config, seed=step)).square().mean()
        loss.backward()
        adapter.layer_norms()
        adapter.step(adapter.optimizer.rate(step + 1))
        losses.append(float(loss.detach()).hex())
    return losses


def unused_but_there() -> list[str]:
    """Those of `UNUSED` that this process has imported."""
    from sfl.model.deferred import is_deferred

    return [name for name in UNUSED if name in sys.modules and not is_deferred(name)]


def main(kind: str, families: list[str]) -> None:
    from sfl.model.lean_imports import lean_imports

    if kind == "lean":
        lean_imports()
    import_module("sfl.device.daemon")
    losses, there = {}, {"daemon": unused_but_there()}
    for family in families:
        losses[family] = train(family)
        there[family] = unused_but_there()
    print(json.dumps({"losses": losses, "there": there}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
