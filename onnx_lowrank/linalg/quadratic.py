"""The error of a layer as a quadratic function of its weight, from moments of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Moments, Targets
from onnx_lowrank.errors import InputError

_DEAD = 1e-9  # the ridge of inputs that are always zero, relative to the mean over the operator groups
_RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_SUMS = 128  # sums of output features that judge a ridge
_DEFINITE = 1e-6  # keeps inputs that never vary from making the moments singular

INPUT_RIDGE = 0.1
"""The least ridge. On several models it never cost much, and it kept inputs that are mostly alike (padding)
from deciding alone."""

Weights = NDArray[np.float64]
"""A canonical weight (g, f, c, *kernel) or its matrices (g, f, p), p = c · prod(kernel)."""


@dataclass(frozen=True)
class Quadratic:
    """e(Ŵ) = Σ_g a − 2⟨Ŵ, X⟩ + ⟨Ŵ C, Ŵ⟩: the expected squared error of a layer's outputs, plus a ridge.

    g operator groups have f output features each; patches have p = c · prod(kernel) elements in the
    order (c, *kernel) of the canonical weight.

    Attributes:
        second: C, second moments of the patches, shape (g, p, p); symmetric, positive semidefinite.
        cross: X, moments of outputs with patches, shape (g, f, p).
        power: a, shape (g,); e(Ŵ) is relative to its sum, the error of Ŵ = 0.
        known: A minimizer X C⁻¹, if one is known without solving for it; shape (g, f, p).

    Raises:
        InputError: The moments are not finite.
    """

    second: NDArray[np.float64]
    cross: NDArray[np.float64]
    power: NDArray[np.float64]
    known: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if not all(np.isfinite(array).all() for array in (self.second, self.cross, self.power)):
            raise InputError(
                "The moments of a layer's activations are not finite in float64: look for NaN, Inf and huge "
                "values in the calibration data and in the model's weights."
            )

    @cached_property
    def optimum(self) -> NDArray[np.float64]:
        """The weight X C⁻¹ with the least error, shape (g, f, p)."""
        if self.known is not None:
            return self.known
        return np.stack([_regression(*group) for group in zip(self.second, self.cross, strict=True)])


def of_weight(weight: NDArray[Any], inputs: Moments, *, centred: bool, ridge: float) -> Quadratic:
    """The error E‖(W − Ŵ) x‖² + λ ‖W − Ŵ‖² of an approximation of a weight on its own inputs.

    Args:
        weight: Canonical weight W, shape (g, f, c, *kernel), any real dtype.
        inputs: Moments of the patches x.
        centred: Whether a bias takes up the change of the mean, so only deviations from the mean count.
        ridge: λ relative to the mean of the diagonal of C, per operator group. Inputs that are all zero
            count as white noise, so the error is that of the weight itself.
    """
    matrices = matrices_of(weight)
    second = about(inputs.mean, inputs.mean, inputs.second, centred)
    _add_to_diagonal(second, ridges(input_power(second), ridge))
    cross = matrices @ second
    return Quadratic(second, cross, np.einsum("gfp,gfp->g", cross, matrices), matrices)


def of_targets(
    weight: NDArray[Any], inputs: Moments, targets: Targets, *, centred: bool, ridge: float
) -> Quadratic:
    """The error E‖y − Ŵ x‖² + λ ‖W − Ŵ‖² of a weight with inputs x and target outputs y.

    Args:
        weight: Canonical weight W towards which the ridge pulls, shape (g, f, c, *kernel).
        inputs: Moments of the patches x.
        targets: Moments of the targets y, and cross moments of y with x.
        centred: Whether a bias takes up the means of both.
        ridge: λ, as in `of_weight`.
    """
    matrices = matrices_of(weight)
    second = about(inputs.mean, inputs.mean, inputs.second, centred)
    level = ridges(input_power(second), ridge)
    _add_to_diagonal(second, level)
    cross = about(targets.mean, inputs.mean, targets.cross, centred) + level[:, None, None] * matrices
    return Quadratic(second, cross, _power(targets, centred) + level * np.sum(matrices**2, axis=(1, 2)))


def error(quadratic: Quadratic, weight: Weights) -> float:
    """e(Ŵ) / e(0), at least 0; if e(0) is zero, 0 for a weight without error, and otherwise Inf."""
    matrices = weight.reshape(quadratic.cross.shape)
    total = float(np.sum(quadratic.power))
    gain = 2 * quadratic.cross - matrices @ quadratic.second
    value = total - float(np.einsum("gfp,gfp->", matrices, gain))
    if total > 0:
        return max(value / total, 0.0)
    return inf if value > 0 else 0.0


def best_ridge(
    weight: NDArray[Any],
    inputs: Moments,
    targets: Targets,
    held_inputs: Moments,
    held_targets: Targets,
    *,
    centred: bool,
    grid: Sequence[float] = _RIDGES,
    each: Callable[[Callable[[float], float], Sequence[float]], Iterable[float]] = map,
) -> float:
    """The ridge of `of_targets` whose minimizer has the least error E‖y − Ŵ x‖² on held-out moments.

    The minimizers are W + D, D = (X − W C) (C + λ)⁻¹, so their errors are e(W) − 2 ⟨D, X' − W C'⟩ +
    ⟨D, D C'⟩ with the held-out moments X' and C'. Sums of many output features with random signs keep squared
    errors (D. Achlioptas, Database-friendly random projections, 2003), so they stand for the features. A
    Cholesky factorization for each of the few ridges takes less time than one eigendecomposition for all.

    Args:
        weight: Canonical weight W, shape (g, f, c, *kernel).
        inputs: Moments of the patches to fit on.
        targets: Moments of the outputs to fit on.
        held_inputs: Moments of the held-out patches.
        held_targets: Moments of the held-out outputs.
        centred: Whether a bias takes up the means.
        grid: The ridges to try; ties go to the largest one, which stays nearest to W.
        each: Applies a function to all ridges, perhaps in several threads.
    """
    second = about(inputs.mean, inputs.mean, inputs.second, centred)
    held = about(held_inputs.mean, held_inputs.mean, held_inputs.second, centred)
    weights = matrices_of(weight)
    cross = about(targets.mean, inputs.mean, targets.cross, centred)
    held_cross = about(held_targets.mean, held_inputs.mean, held_targets.cross, centred)
    if weights.shape[1] > _SUMS:
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (_SUMS, weights.shape[1])) / np.sqrt(_SUMS)
        weights, cross, held_cross = signs @ weights, signs @ cross, signs @ held_cross
    residual, missing = cross - weights @ second, held_cross - weights @ held
    total = float(np.sum(_power(held_targets, centred)))

    def held_error(ridge: float) -> float:
        """The error relative to that of no weight at all, up to a constant that all ridges share."""
        if total <= 0:
            return 1.0
        change = 0.0
        for group, level in enumerate(ridges(input_power(second), ridge)):
            damped = second[group].copy()
            np.fill_diagonal(damped, damped.diagonal() + level)
            moved = _regression(damped, residual[group])
            change += float(np.vdot(moved, moved @ held[group] - 2 * missing[group]))
        return 1 + change / total  # rounding errors of equally good ridges vanish beside 1

    largest_first = sorted(grid, reverse=True)
    errors = list(each(held_error, largest_first))
    return largest_first[errors.index(min(errors))]


def shrinkage(moments: Moments, least: float = 0.0) -> float:
    """The ridge that second moments need, given the number of independent vectors that they are worth.

    The oracle approximating shrinkage ρ of Chen, Wiesel, Eldar, Hero, "Shrinkage Algorithms for MMSE
    Covariance Estimation", 2010, eq. 23, as a ridge ρ / (1 − ρ) relative to the mean variance; the largest
    over the operator groups, at least `least`, and at most 1.
    """
    n = moments.second.shape[-1]
    trace = np.trace(moments.second, axis1=1, axis2=2)
    squares = np.einsum("gij,gij->g", moments.second, moments.second)
    count = moments.count if moments.independent is None else moments.independent
    excess = (count + 1 - 2 / n) * (squares - trace**2 / n)
    wanted = (1 - 2 / n) * squares + trace**2
    share = np.where(wanted < excess, wanted / np.where(excess > 0, excess, 1.0), 1.0)
    rho = min(float(np.max(share)), 0.5)
    return max(rho / (1 - rho), least, _DEFINITE)


def matrices_of(weight: NDArray[Any]) -> NDArray[np.float64]:
    """A canonical weight as matrices of shape (g, f, p), in float64."""
    return weight.astype(np.float64).reshape(*weight.shape[:2], -1)


def about(
    left: NDArray[np.float64], right: NDArray[np.float64], moments: NDArray[np.float64], centred: bool
) -> NDArray[np.float64]:
    """A copy of centred moments, or the moments about zero: E[y xᵀ] = E[(y − E y)(x − E x)ᵀ] + E y E xᵀ."""
    return moments.copy() if centred else moments + left[:, :, None] * right[:, None, :]


def input_power(second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean power of an element of the inputs, shape (g,), from their second moments, (g, p, p)."""
    power: NDArray[np.float64] = np.trace(second, axis1=1, axis2=2) / second.shape[-1]
    return power


def _power(targets: Targets, centred: bool) -> NDArray[np.float64]:
    return targets.power if centred else targets.power + np.sum(targets.mean**2, axis=1)


def ridges(power: NDArray[np.float64], ridge: float) -> NDArray[np.float64]:
    """λ of every group, shape (g,), from the mean power of an element of its inputs.

    A group with power zero gets a tiny λ relative to the other groups, or 1 if all groups have power zero.
    """
    mean = float(np.mean(power))
    return np.where(power > 0, ridge * power, _DEAD * mean if mean > 0 else 1.0)


def _add_to_diagonal(second: NDArray[np.float64], level: NDArray[np.float64]) -> None:
    """Add λ_g I in place."""
    index = np.arange(second.shape[-1])
    second[:, index, index] += level[:, None]


def _regression(second: NDArray[np.float64], cross: NDArray[np.float64]) -> NDArray[np.float64]:
    """X C⁺ of one group; if C is singular to working precision, the solution of least norm."""
    try:
        lower = np.linalg.cholesky(second)
    except np.linalg.LinAlgError:
        return cross @ scipy.linalg.pinvh(second)
    diagonal = np.diagonal(second)
    if np.min(np.diagonal(lower)) ** 2 <= len(second) * np.finfo(np.float64).eps * np.max(diagonal):
        return cross @ scipy.linalg.pinvh(second)
    solution: NDArray[np.float64] = scipy.linalg.cho_solve((lower, True), cross.T).T
    return solution
