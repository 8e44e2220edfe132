"""The Schatten 4-norm of the residual: between the Frobenius (2) and the spectral norm (∞)."""

from __future__ import annotations

import numpy as np

from onnx_lowrank.measures import Floats, Measure, Needs, of_spectra


def tails(values: Floats, power: int) -> Floats:
    """The sums Σ_i Σ_{m>j} σ_{i,m}^power beyond the ranks j = 0, 1, …, full rank − 1.

    Args:
        values: Singular values of the slices, descending, shape (groups, k, full rank).
        power: The exponent.

    Returns:
        Shape (full rank,).
    """
    # The sum starts with the smallest values, which keeps small tails exact.
    return np.asarray(np.cumsum((values**power).sum(axis=(0, 1))[::-1])[::-1])


def _formula(values: Floats, whole: Floats) -> tuple[Floats, np.float64]:
    # Without division by the unit, fourth powers of small weights underflow.
    unit = whole.max() or 1.0
    return tails(values / unit, 4) ** 0.25 * unit, tails(whole / unit, 4)[0] ** 0.25 * unit


MEASURE = Measure(
    summary="(Σ_i Σ_{m>j} σ⁴_{i,m} / Σ_m σ_m(W)⁴)^¼",
    needs=Needs.WEIGHTS,
    errors=of_spectra(_formula),
)
