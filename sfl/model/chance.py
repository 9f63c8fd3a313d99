"""What dropout draws from: the state of torch's generators, to be kept and to be set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from sfl.state_file import Tensors

RandomState = dict[str, torch.Tensor]
"""State of the default generator, uint8, by kind of device: "cpu", and "cuda" once that is in use."""


def seeded(seed: int) -> RandomState:
    """The state of generators that begin with `seed`."""
    return {kind: torch.Generator(kind).manual_seed(seed).get_state() for kind in _kinds()}


def current() -> RandomState:
    """Copies of the state now."""
    return {kind: torch.cuda.get_rng_state() if kind == "cuda" else torch.get_rng_state() for kind in _kinds()}


def use(state: RandomState) -> None:
    """Have the generators go on from `state`; one that it says nothing of stays as it is."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and "cuda" in _kinds():
        torch.cuda.set_rng_state(state["cuda"])


@contextlib.contextmanager
def apart(state: RandomState) -> Iterator[None]:
    """Draw from `state` inside the block; outside nothing is drawn from."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if "cuda" in _kinds() else []):
        use(state)
        yield


def to_arrays(state: RandomState) -> Tensors:
    return {f"random/{kind}": value.numpy().copy() for kind, value in state.items()}


def from_arrays(tensors: Tensors) -> RandomState:
    prefix = "random/"
    return {name[len(prefix) :]: torch.from_numpy(value.copy()) for name, value in tensors.items() if name.startswith(prefix)}


def _kinds() -> tuple[str, ...]:
    in_use: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return ("cpu", "cuda") if in_use else ("cpu",)
