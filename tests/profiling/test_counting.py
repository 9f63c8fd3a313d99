"""The counter beside what autograd itself says that it saves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sfl.profiling.counting import StepCounter

WIDTH, ROWS, LAYERS = 64, 256, 6


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)]
    )


def saved_by_autograd(net: nn.Module, x: Tensor) -> int:
    """Bytes of unique storages that the backward pass needs, without parameters and the input."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), x)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = net(x)
    assert output.requires_grad
    return sum(kept.values())


def counted(net: nn.Module, x: Tensor, checkpointed: bool) -> StepCounter:
    """One step, its phases told to the counter as the recorder tells them."""
    counter = StepCounter()
    with counter:
        output = x
        for block in net.children():
            output = checkpoint(block, output, use_reentrant=False) if checkpointed else block(output)
        counter.end_of("forward", net.parameters())
        gradient = torch.ones_like(output)
        output.backward(gradient)
        grads = [parameter.grad for parameter in net.parameters() if parameter.grad is not None]
        counter.end_of("backward", [*net.parameters(), *grads, gradient])
    return counter


def test_forward_keeps_what_autograd_saves_and_its_output() -> None:
    net, x = model(), torch.randn(ROWS, WIDTH)
    forward = counted(net, x, checkpointed=False).phases["forward"]
    assert forward.activations == saved_by_autograd(net, x) + ROWS * WIDTH * 4
    backward = counted(net, x, checkpointed=False).phases["backward"]
    assert 0 < backward.activations <= forward.activations
    assert backward.temporaries > 0


def test_what_a_checkpoint_computes_again_is_counted_when_it_exists() -> None:
    net, x = model(), torch.randn(ROWS, WIDTH)
    plain, sparing = counted(net, x, checkpointed=False), counted(net, x, checkpointed=True)
    inputs = LAYERS * ROWS * WIDTH * 4  # each block's but the first one's, and the output
    assert sparing.phases["forward"].activations == inputs
    one_block = saved_by_autograd(net[0], x)
    assert sparing.phases["backward"].activations >= one_block
    assert sparing.phases["backward"].activations <= inputs + one_block + 2 * ROWS * WIDTH * 4
    assert sparing.phases["backward"].activations < plain.phases["backward"].activations


@pytest.mark.parametrize("checkpointed", [False, True])
def test_counting_changes_no_number(checkpointed: bool) -> None:
    x = torch.randn(ROWS, WIDTH)
    watched, alone = model(), model()
    counted(watched, x, checkpointed)
    alone(x).backward(torch.ones(ROWS, WIDTH))
    for one, other in zip(watched.parameters(), alone.parameters()):
        assert torch.equal(one.grad, other.grad)
