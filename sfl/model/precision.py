"""Number formats of a half: which its frozen linear layers are kept in, and whether this machine computes with them."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from sfl.errors import PrecisionError
from sfl.model.frozen import CastLinear, FrozenLinear
from sfl.model.quantised import Int8Linear, Nf4Linear, QuantisedLinear
from sfl.settings import Compute, Precision, RunOn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_QUANTISED: dict[str, type[QuantisedLinear]] = {"int8": Int8Linear, "nf4": Nf4Linear}
_TOLERANCE = {"fp32": 0.02, "bf16": 0.02, "int8": 0.03, "nf4": 0.2}  # of one layer; nf4's own error is 0.09


def freeze_linears(blocks: Iterable[nn.Module], precision: Precision, compute: Compute) -> None:
    """Make the linear layers of a skeleton's blocks keep their weight in `precision`; biases stay in `compute`.

    Layers that are kept as they compute stay what they are.
    """
    if precision == compute:
        return
    for block in blocks:
        for path, module in list(block.named_modules()):
            if isinstance(module, (nn.Linear, Conv1D)):
                block.set_submodule(path, _frozen(module, precision))


def _frozen(module: nn.Linear | Conv1D, precision: Precision) -> FrozenLinear:
    transposed = isinstance(module, Conv1D)
    if precision in _QUANTISED:
        return _QUANTISED[precision](module, transposed)
    return CastLinear(module, transposed, DTYPES[precision])


@functools.cache
def require_runnable(precision: Precision, compute: Compute, run_on: RunOn) -> None:
    """Run a small layer of this kind, forward and backward, and compare the result with what it should be.

    Raises `ModelError` where this machine cannot, and says why.
    """
    if run_on == "cuda" and not torch.cuda.is_available():
        raise PrecisionError(
            "run_on is cuda, but this torch finds no GPU: install one that is built for it, or take run_on = cpu"
        )
    what = f"{precision} weights with {compute} activations on this machine's {'GPU' if run_on == 'cuda' else 'processor'}"
    try:
        error = _error_of_a_layer(precision, compute, run_on)
    except (RuntimeError, NotImplementedError, AttributeError, OSError, ValueError, TypeError) as failure:
        raise PrecisionError(
            f"{what} do not run: {' '.join(str(failure).split())}. Take another precision or compute"
        ) from failure
    if not error < _TOLERANCE[precision]:
        raise PrecisionError(f"{what} give wrong numbers: they are off by {error:.0%}. Take another precision or compute")


def _error_of_a_layer(precision: Precision, compute: Compute, run_on: RunOn) -> float:
    """The larger relative error of a layer's result and gradient, against the weight before it was quantised."""
    generator = torch.Generator().manual_seed(0)
    weight, x, gradient = (torch.randn(64, 64, generator=generator) for _ in range(3))
    with torch.device("meta"):
        like = nn.Linear(64, 64, bias=False)
    if precision in _QUANTISED:
        quantised = _QUANTISED[precision](like, False)
        quantised.hold(*quantised.quantise(weight))
        layer: FrozenLinear = quantised
    else:
        layer = CastLinear(like, False, DTYPES[precision])
        layer.weight = nn.Parameter(weight.to(DTYPES[precision]), requires_grad=False)
    layer.to(run_on)
    moved = x.detach().to(run_on, DTYPES[compute]).requires_grad_(True)
    result = layer(moved)
    (result * gradient.to(result)).sum().backward()
    if moved.grad is None:
        raise RuntimeError("no gradient came back")
    pairs = ((result.detach(), x @ weight.t()), (moved.grad, gradient @ weight))
    return max(float((ours.float().cpu() - exact).norm() / exact.norm()) for ours, exact in pairs)
