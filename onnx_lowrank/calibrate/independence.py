"""The number of independent vectors that second moments are worth.

Tokens of one text, and patches of one image, are alike: a thousand of them tell less of the covariance than
a thousand texts do. The ridge of a fit depends on this number (`linalg.quadratic.shrinkage`), so it is
estimated from the variation between blocks, which are independent: samples, or batches of them where the
rows of a sample are not known.

S are the second moments of all N vectors, S_m those of the N_m vectors of block m of M, all about one mean.
V = M / (M − 1) · Σ (N_m / N)² ‖S_m − S‖² estimates E‖S − Σ‖² (Frobenius norms; Σ are the true moments). For
n independent Gaussian vectors it is (tr Σ² + tr² Σ) / n, so the vectors are worth n = (tr S² + tr² S) / V.
Vectors a, b of random signs give E(aᵀ D b)² = ‖D‖² for any matrix D, so no block needs a matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_PAIRS = 16  # of random signs: with two blocks, V is known to a factor of about 1.4, with more of them better


class Blocks:
    """Sums over blocks of vectors; memory does not grow with their number."""

    def __init__(self, groups: int, size: int) -> None:
        """Start without vectors.

        Args:
            groups: Number of groups, g.
            size: Length of a vector, n.
        """
        signs = np.random.default_rng(0).integers(0, 2, (2, groups, size, _PAIRS)) * 2 - 1
        self._left, self._right = signs.astype(np.float32)
        self._center: NDArray[Any] | None = None
        self._open = np.zeros((4, groups, _PAIRS))  # of (a x)(b x), a x, b x, and 1 over the vectors x
        self._gram = np.zeros((4, 4, groups, _PAIRS))
        self._total = np.zeros((4, groups, _PAIRS))
        self._blocks = 0

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, rows: NDArray[Any], span: int | None = None) -> None:
        """Add vectors to the open block.

        Args:
            rows: Shape (number, g, n).
            span: The number of vectors of every sample, if samples follow each other; None adds all of them
                to one block.
        """
        if not len(rows):
            return
        if self._center is None:
            self._center = rows.mean(axis=0)  # near the mean, so that no digits cancel
        centred = np.swapaxes(rows - self._center, 0, 1)
        left, right = centred @ self._left, centred @ self._right
        opened = int(self._open[3].flat[0])
        first = len(rows) if span is None else min(-opened % span, len(rows))
        self._open += _sums(left[:, :first], right[:, :first], 1)[:, :, 0]
        if span is None:
            return
        if opened + first == span:
            self.close()
        # Chunks need not end where samples end: the rows behind the last whole sample open the next block.
        number = (len(rows) - first) // span
        last = first + number * span
        if number:
            self._closed(_sums(left[:, first:last], right[:, first:last], number))
        self._open += _sums(left[:, last:], right[:, last:], 1)[:, :, 0]

    def close(self) -> None:
        """End the open block; the next vectors belong to another one."""
        if self._open[3].any():
            self._closed(self._open[:, :, None])
            self._open = np.zeros_like(self._open)

    def _closed(self, sums: NDArray[np.float64]) -> None:
        """Add the sums of closed blocks, shape (4, g, blocks, pairs)."""
        self._gram += np.einsum("agmr,bgmr->abgr", sums, sums)
        self._total += sums.sum(axis=2)
        self._blocks += sums.shape[2]

    def independent(self, mean: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
        """The number of independent vectors that all closed blocks are worth; None for fewer than two blocks.

        Args:
            mean: The mean of all vectors, shape (g, n).
            second: Their centred second moments, shape (g, n, n).
        """
        if self._blocks < 2 or self._center is None:
            return None
        shift = mean - self._center
        alpha, beta = (np.einsum("gn,gnr->gr", shift, signs) for signs in (self._left, self._right))
        count = self._total[3]
        whole = np.stack([np.ones_like(alpha), -beta, -alpha, alpha * beta])  # of a sum about the mean
        average = np.einsum("kgr,kgr->gr", whole, self._total) / count
        apart = whole - np.stack([np.zeros_like(alpha)] * 3 + [average])
        squares = np.einsum("kgr,klgr,lgr->gr", apart, self._gram, apart)
        spread = (squares / count**2).mean(axis=1) * self._blocks / (self._blocks - 1)
        power = np.einsum("gij,gij->g", second, second) + np.trace(second, axis1=1, axis2=2) ** 2
        most = float(count.flat[0])
        worth = np.where(spread > power / most, power / np.where(spread > 0, spread, 1.0), most)
        return float(worth.min())


def _sums(left: NDArray[Any], right: NDArray[Any], number: int) -> NDArray[np.float64]:
    """Sums over blocks of the same size of (a x)(b x), a x, b x and 1; shape (4, g, number, pairs).

    Args:
        left: a x of every vector, shape (g, vectors, pairs).
        right: b x, likewise.
        number: Number of blocks.
    """
    groups, vectors, pairs = left.shape
    shape = groups, number, vectors // number, pairs
    left, right = left.reshape(shape), right.reshape(shape)
    sums = np.stack([each.sum(axis=2, dtype=np.float64) for each in (left * right, left, right)])
    return np.concatenate([sums, np.full((1, *sums.shape[1:]), float(shape[2]))])
