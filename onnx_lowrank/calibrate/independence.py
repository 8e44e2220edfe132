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
        self._signs = np.concatenate(signs.astype(np.float32), axis=-1)  # a and b
        self._center: NDArray[Any] | None = None
        self._open = np.zeros((4, groups, _PAIRS))  # of (a x)(b x), a x, b x, and 1 over the vectors x
        self._gram = np.zeros((4, 4, groups, _PAIRS))
        self._total = np.zeros((4, groups, _PAIRS))
        self._blocks = 0
        self._sample: int | None = None  # that of the open block

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, rows: NDArray[Any], samples: NDArray[np.intp] | None = None) -> None:
        """Add vectors.

        Args:
            rows: Shape (number, g, n).
            samples: The number of the sample of every vector, ascending: vectors of one number in a row are a
                block, also over several calls. None adds all of them to the open block.
        """
        if not len(rows):
            return
        if self._center is None:
            self._center = rows.mean(axis=0)  # near the mean, so that no digits cancel
        centred = np.swapaxes(rows - self._center, 0, 1)
        starts = np.zeros(1, np.intp)
        if samples is not None:
            if self._sample not in (None, samples[0]):
                self.close()
            starts = np.flatnonzero(np.concatenate([[True], np.diff(samples) != 0]))
        images = centred @ self._signs
        sums = _sums(images[..., :_PAIRS], images[..., _PAIRS:], starts)
        self._open += sums[:, :, 0]
        if len(starts) > 1:
            self.close()
            if len(starts) > 2:
                self._closed(sums[:, :, 1:-1])
            # Chunks need not end where samples end: the next one may have more vectors of the last sample.
            self._open += sums[:, :, -1]
        self._sample = None if samples is None else int(samples[-1])

    def close(self) -> None:
        """End the open block; the next vectors belong to another one."""
        if self._open[3].any():
            self._closed(self._open[:, :, None])
            self._open = np.zeros_like(self._open)
        self._sample = None

    @np.errstate(over="ignore", invalid="ignore")
    def merge(self, other: Blocks) -> None:
        """Add the closed blocks of other vectors; they stay apart from those here.

        Args:
            other: Sums over vectors of the same shape, without an open block.
        """
        if other._center is None:
            return
        if self._center is None:
            self._center = other._center
        # Vectors x about one center are x + d about the other, and a (x + d) = a x + a d.
        shift = (other._center - self._center).astype(np.float64)
        alpha, beta = np.split(np.einsum("gn,gnr->gr", shift, self._signs), 2, axis=-1)
        one, none = np.ones_like(alpha), np.zeros_like(alpha)
        moved = np.array(
            [
                [one, beta, alpha, alpha * beta],
                [none, one, none, alpha],
                [none, none, one, beta],
                [none, none, none, one],
            ]
        )
        self._gram += np.einsum("akgr,klgr,blgr->abgr", moved, other._gram, moved)
        self._total += np.einsum("akgr,kgr->agr", moved, other._total)
        self._blocks += other._blocks

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
        alpha, beta = np.split(np.einsum("gn,gnr->gr", shift, self._signs), 2, axis=-1)
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


def _sums(left: NDArray[Any], right: NDArray[Any], starts: NDArray[np.intp]) -> NDArray[np.float64]:
    """Sums over blocks of (a x)(b x), a x, b x and 1; shape (4, g, blocks, pairs).

    Args:
        left: a x of every vector, shape (g, vectors, pairs).
        right: b x, likewise.
        starts: The first vector of every block.
    """
    given = (left * right, left, right)
    sums = np.stack([np.add.reduceat(each, starts, axis=1, dtype=np.float64) for each in given])
    counts = np.diff(starts, append=left.shape[1]).astype(np.float64)
    return np.concatenate([sums, np.broadcast_to(counts[:, None], (1, *sums.shape[1:]))])
