from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfl.errors import AdapterError
from sfl.fed_server.merges.factors import Stack, best, compress, norm, svd

sizes = st.integers(1, 9)


def product(seed: int, out: int, inner: int, into: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((out, inner)).astype("f4"), rng.standard_normal((inner, into)).astype("f4")


@given(st.integers(0, 10**6), sizes, st.integers(1, 30), sizes)
@settings(max_examples=40, deadline=None)
def test_factored_values_are_those_of_the_dense_matrix(seed: int, out: int, inner: int, into: int) -> None:
    left, right = product(seed, out, inner, into)
    dense = left.astype(float) @ right
    u, s, vt = svd(left, right)
    np.testing.assert_allclose((u * s) @ vt, dense, atol=1e-9)
    np.testing.assert_allclose(s, np.linalg.svd(dense)[1][: len(s)], atol=1e-9)
    assert len(s) == min(out, inner, into)
    assert norm(left, right) == pytest.approx(np.linalg.norm(dense))
    smaller_left, smaller_right = compress(left, right)
    np.testing.assert_allclose(smaller_left @ smaller_right, dense, atol=1e-5)
    assert smaller_left.shape[1] <= np.linalg.matrix_rank(dense)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 6), max_size=20))
@settings(max_examples=40, deadline=None)
def test_a_stack_is_the_sum_of_its_products_and_stays_bounded(seed: int, ranks: list[int]) -> None:
    stack, dense = Stack(5, 7), np.zeros((5, 7))
    for number, rank in enumerate(ranks):
        left, right = product(seed + number, 5, rank, 7)
        stack.add(left, right)
        dense += left.astype(float) @ right
        assert stack.factors()[0].shape[1] <= 10
    for left, right in (stack.factors(), stack.compressed()):
        np.testing.assert_allclose(left @ right, dense, atol=1e-4)
    assert stack.compressed()[0].shape[1] <= 5


def test_what_cancels_leaves_nothing() -> None:
    stack, (left, right) = Stack(5, 7), product(1, 5, 2, 7)
    stack.add(left, right)
    stack.add(-0.25 * left, right)
    stack.add(-0.75 * left, right)
    assert stack.compressed()[0].shape == (5, 0) and stack.compressed()[1].shape == (0, 7)


def test_the_best_approximation_turns_to_the_factors_it_follows() -> None:
    left, right = product(2, 6, 3, 7)
    b, a = best(left, right, left, right)
    turned, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((3, 3)))
    again_b, again_a = best(b @ turned.astype("f4"), turned.T.astype("f4") @ a, b, a)  # the same product in another basis
    np.testing.assert_allclose(again_b, b, atol=1e-5)
    np.testing.assert_allclose(again_a, a, atol=1e-5)


def test_values_that_are_not_finite_are_refused() -> None:
    left, right = product(4, 5, 2, 7)
    left[0, 0] = np.inf
    with pytest.raises(AdapterError, match="not finite"):
        best(left, right, left, right)
