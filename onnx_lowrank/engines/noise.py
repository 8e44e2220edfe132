"""The sampling noise of an error: how far it may lie from the error on all inputs of the same kind."""

from __future__ import annotations

from math import prod, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Noise:
    """The standard error of ‖y − ŷ‖ / ‖y‖ of one output over samples; batches are streamed.

    Tokens of one text and pixels of one image are alike, so only whole samples count as independent. With a
    sample's a = ‖y − ŷ‖² and b = ‖y‖², R = Σa / Σb has the variance n / (n − 1) · Σ(a − R b)² / (Σb)², the
    ratio estimator of Cochran, "Sampling Techniques", 1977, section 6.4; its root has that of R / (4 R).
    """

    def __init__(self) -> None:
        self._count = 0
        self._sums = np.zeros(5)  # of a, b, a², a b, b²

    @np.errstate(over="ignore", invalid="ignore")
    def add(self, difference: NDArray[Any], y: NDArray[Any], *, batched: bool) -> None:
        """Add one batch.

        Args:
            difference: y − ŷ, float64 or complex128; elements that do not count are 0.
            y: The output, with the same elements 0.
            batched: Whether its first axis counts samples; otherwise, the output is one sample.
        """
        a, b = (_squares(array if batched else array[None]) for array in (difference, y))
        self._count += len(a)
        self._sums += [a.sum(), b.sum(), a @ a, a @ b, b @ b]

    @property
    def error(self) -> float | None:
        """The standard error; None for fewer than two samples, outputs that are all zero, and overflow."""
        a, b, aa, ab, bb = self._sums
        if self._count < 2 or not b > 0:
            return None
        # NumPy's numbers: Python's raise an error on overflow. Divided one by one, as b² overflows early.
        with np.errstate(over="ignore", invalid="ignore"):
            ratio = a / b
            spread = np.maximum(aa / b - 2 * ratio * (ab / b) + ratio * (ratio * (bb / b)), 0.0)
            variance = spread / b * self._count / (self._count - 1)
        if not np.isfinite(variance):
            return None
        return sqrt(variance / (4 * ratio)) if ratio > 0 else 0.0


def _squares(rows: NDArray[Any]) -> NDArray[np.float64]:
    """The squared norm of every sample."""
    flat = rows.reshape(len(rows), prod(rows.shape[1:]))
    squares: NDArray[np.float64] = np.einsum("ij,ij->i", flat, flat.conj()).real
    return squares
