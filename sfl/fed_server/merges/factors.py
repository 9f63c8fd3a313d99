"""Matrices as products of factors: sums, norms and best approximations without the matrix itself, which would be out x in."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sfl.adapters.state import Array
from sfl.errors import AdapterError

Exact = npt.NDArray[np.float64]

_ROUNDING = float(np.finfo(np.float32).eps)  # relative; what is less of a matrix is lost when its factors become float32


class Stack:
    """A matrix (out x in) as a sum of products left_j (out x r_j) @ right_j (r_j x in), in float64.

    While it grows, it is compressed to as many columns as the smaller of `out` and `in` whenever it has twice as many, so that
    its memory stays bounded however many products are added.
    """

    def __init__(self, out: int, into: int) -> None:
        self._full = min(out, into)
        self._left: list[Exact] = [np.zeros((out, 0))]
        self._right: list[Exact] = [np.zeros((0, into))]
        self._width = 0
        self._largest = 0.0

    def add(self, left: Array | Exact, right: Array | Exact) -> None:
        """Add `left @ right`."""
        size = norm(left, right)
        if size == 0:
            return
        self._left.append(left.astype(np.float64))
        self._right.append(right.astype(np.float64))
        self._width += left.shape[1]
        self._largest = max(self._largest, size)
        if self._width > 2 * self._full:
            factors = self.compressed()
            self._left, self._right, self._width = [factors[0]], [factors[1]], factors[0].shape[1]

    def factors(self) -> tuple[Exact, Exact]:
        """The sum as one product: left (out x m) and right (m x in), where m may be 0."""
        return np.concatenate(self._left, axis=1), np.concatenate(self._right, axis=0)

    def compressed(self) -> tuple[Exact, Exact]:
        """The same with as few columns as its rank; what rounding the largest of its products to float32 changes is no rank."""
        return compress(*self.factors(), least=_ROUNDING * self._largest)


def svd(left: Array | Exact, right: Array | Exact) -> tuple[Exact, Exact, Exact]:
    """The singular value decomposition U (out x n), S (n), V' (n x in) of `left @ right`, n = min(out, in, columns of left).

    left = Q1 R1, right' = Q2 R2, R1 R2' = u S v', U = Q1 u, V = Q2 v. Raises `AdapterError` for values that are not finite.
    """
    q1, r1 = np.linalg.qr(left.astype(np.float64))
    q2, r2 = np.linalg.qr(right.astype(np.float64).T)
    with np.errstate(invalid="ignore", over="ignore"):  # it is looked at there
        core = r1 @ r2.T
    u, s, vt = _decomposed(core)
    return q1 @ u, s, vt @ q2.T


def _decomposed(matrix: Exact) -> tuple[Exact, Exact, Exact]:
    if not np.isfinite(matrix).all():
        raise AdapterError("a product of factors is not finite: has an update with such values, or with huge ones, come in?")
    try:
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise AdapterError(f"a product of factors has no singular values: {error}") from error
    return u, s, vt


def compress(left: Array | Exact, right: Array | Exact, least: float = 0.0) -> tuple[Exact, Exact]:
    """Factors of the same matrix, to the accuracy of float32, without singular values that are `least` or less."""
    u, s, vt = svd(left, right)
    kept = s > max(least, _ROUNDING * s.max(initial=0.0))
    root = np.sqrt(s[kept])
    return u[:, kept] * root, root[:, None] * vt[kept]


def best(left: Array | Exact, right: Array | Exact, near_b: Array, near_a: Array) -> tuple[Array, Array]:
    """The best approximation B A (out x r, r x in) of `left @ right`, with the rank r of `near_a`, in a basis close to that.

    The r largest singular values (Eckart and Young), a square root of each on either side. Then B Q and Q' A, with the
    orthogonal Q that brings them closest to `near_b` and `near_a`: with u S v' = B' near_B + A near_A', Q = u v' (Procrustes).
    Where there are fewer than r singular values, columns of B are zero and rows of A are those parts of `near_a` that lie
    outside the others: they change nothing, and unlike zero beside zero they can be trained.
    """
    rank = len(near_a)
    u, s, vt = svd(left, right)
    live = int(np.count_nonzero(s > _ROUNDING * s.max(initial=0.0)))
    live = min(live, rank)
    root = np.sqrt(s[:live])
    b = np.zeros((left.shape[0], rank))
    a = np.zeros((rank, right.shape[1]))
    b[:, :live], a[:live] = u[:, :live] * root, root[:, None] * vt[:live]
    if live < rank:
        outside = near_a - (near_a @ vt[:live].T) @ vt[:live]
        _, lengths, directions = _decomposed(outside)
        count = min(rank - live, len(lengths))
        a[live : live + count] = lengths[:count, None] * directions[:count]
    left_turn, _, right_turn = _decomposed(b.T @ near_b + a @ near_a.T)
    turn = left_turn @ right_turn
    return (b @ turn).astype(np.float32), (turn.T @ a).astype(np.float32)


def norm(left: Array | Exact, right: Array | Exact) -> float:
    """||left @ right||_F, of which the square is the sum over (left' left) * (right right')."""
    wide_left, wide_right = left.astype(np.float64, copy=False), right.astype(np.float64, copy=False)
    square = np.sum((wide_left.T @ wide_left) * (wide_right @ wide_right.T))
    return float(np.sqrt(max(square, 0.0)))  # rounding may take it below zero
