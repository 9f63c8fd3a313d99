"""Micro-batches and checkpointing keep less for the backward pass, and change nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sfl.model.recompute import forward_in_micro_batches, recompute_blocks
from tests.edge_server.made import Halves

IDS = torch.randint(4, 100, (5, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, 4:] = 0


def trained(family: str, micro_batch: int, checkpointing: bool, dropout: float = 0.0) -> tuple[Tensor, dict[str, Tensor], int]:
    """The activation, the adapter's gradients, and the bytes that one forward pass kept for the backward pass."""
    halves = Halves(family, dropout=dropout)
    half, adapter = halves.device(cut=2)
    for key, parameter in adapter._parameters.items():  # B is zero in version 0, and so would be the gradient of A
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(str(key))))
    adapter.mount()
    if checkpointing:
        recompute_blocks(half)
    half.train()
    torch.manual_seed(3)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        activation = forward_in_micro_batches(half, IDS, MASK, micro_batch) if micro_batch else half(IDS, MASK)
    gradient = torch.randn(activation.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward(activation, gradient)
    gradients = {str(key): parameter.grad for key, parameter in adapter._parameters.items() if parameter.grad is not None}
    assert gradients and all(value.abs().max() > 0 for value in gradients.values())
    return activation.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("family", ["opt", "llama", "bert", "gpt2", "bloom"])
@pytest.mark.parametrize(("micro_batch", "checkpointing"), [(0, True), (1, False), (2, False), (2, True)])
def test_results_are_the_same_and_less_is_kept(family: str, micro_batch: int, checkpointing: bool) -> None:
    activation, gradients, kept = trained(family, 0, False)
    again, same, less = trained(family, micro_batch, checkpointing)
    torch.testing.assert_close(again, activation, rtol=1e-5, atol=1e-6)
    for name, value in gradients.items():
        torch.testing.assert_close(same[name], value, rtol=1e-4, atol=1e-6)
    if micro_batch == 0:
        assert torch.equal(again, activation) and all(torch.equal(same[name], value) for name, value in gradients.items())
    assert less < kept / 2


def test_dropout_draws_the_same_numbers_when_a_block_is_computed_again() -> None:
    activation, gradients, _ = trained("opt", 0, False, dropout=0.5)
    again, same, _ = trained("opt", 0, True, dropout=0.5)
    assert torch.equal(again, activation)
    assert all(torch.equal(same[name], value) for name, value in gradients.items())
    plain, _, _ = trained("opt", 0, False)
    assert not torch.equal(plain, activation)


def test_micro_batches_are_for_evaluation_too() -> None:
    half, adapter = Halves("opt").device(cut=2)
    adapter.mount()
    half.eval()
    with torch.no_grad():
        torch.testing.assert_close(forward_in_micro_batches(half, IDS, MASK, 2), half(IDS, MASK), rtol=1e-5, atol=1e-6)
