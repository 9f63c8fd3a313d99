"""What dropout draws from, kept and set again, on either kind of device."""

from __future__ import annotations

import pytest
import torch

from sfl.model import chance

WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))]


def drawn(where: str, count: int = 3) -> torch.Tensor:
    return torch.nn.functional.dropout(torch.ones(1000 * count, device=where), 0.5).cpu()


@pytest.mark.parametrize("where", WHERE)
def test_two_who_draw_apart_do_not_disturb_each_other(where: str) -> None:
    drawn(where)  # so that the device is in use
    alone = [chance.seeded(seed) for seed in (1, 2)]
    expected = []
    for state in alone:
        with chance.apart(state):
            expected.append([drawn(where) for _ in range(3)])
    assert not torch.equal(expected[0][0], expected[1][0])
    assert not torch.equal(expected[0][0], expected[0][1])
    states, found = [chance.seeded(seed) for seed in (1, 2)], [list[torch.Tensor](), list[torch.Tensor]()]
    for _ in range(3):
        for index in (0, 1):
            drawn(where)  # somebody else
            with chance.apart(states[index]):
                found[index].append(drawn(where))
                states[index] = chance.current()
    assert all(torch.equal(one, other) for mine, theirs in zip(expected, found) for one, other in zip(mine, theirs))


@pytest.mark.parametrize("where", WHERE)
def test_nothing_is_drawn_from_outside(where: str) -> None:
    drawn(where)
    torch.manual_seed(3)
    expected = drawn(where)
    torch.manual_seed(3)
    with chance.apart(chance.seeded(9)):
        drawn(where)
    assert torch.equal(drawn(where), expected)


@pytest.mark.parametrize("where", WHERE)
def test_a_state_goes_through_arrays(where: str) -> None:
    drawn(where)
    torch.manual_seed(4)
    arrays = chance.to_arrays(chance.current())
    assert set(arrays) == {"random/cpu"} | ({"random/cuda"} if torch.cuda.is_initialized() else set())
    expected = drawn(where)
    drawn(where)
    chance.use(chance.from_arrays(arrays))
    assert torch.equal(drawn(where), expected)


def test_a_state_of_a_processor_says_nothing_of_a_gpu() -> None:
    torch.manual_seed(5)
    expected = drawn("cpu")
    chance.use({"cpu": torch.Generator().manual_seed(5).get_state()})
    assert torch.equal(drawn("cpu"), expected)
