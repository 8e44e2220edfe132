"""The factors of one layer, and the certificate of their error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array, Certificate, Factors
from onnx_lowrank.core.option import Option
from onnx_lowrank.errors import PlanError
from onnx_lowrank.linalg.backend import Backend, array_namespace, eigenvectors
from onnx_lowrank.linalg.folding import compose, fold, split

_UNIT = 2.0**-53  # unit roundoff u of float64
_SAFE_EXPONENT = 100  # largest entries of 2^±100 are safe: sums of 2^40 squares stay in range


def factorize(
    weight: NDArray[Any], option: Option, backend: Backend, stored: np.dtype[Any] | None = None
) -> Factors:
    """The best rank-j factors of every slice of a weight (Eckart–Young): U√Σ and √ΣVᵀ.

    The largest entry of every column of U is made positive, so the signs do not depend on LAPACK.
    At full rank the factors reproduce the weight to float64 rounding, however badly conditioned it is;
    rank-deficient slices get finite factors, all-zero ones zeros.

    Args:
        weight: Canonical weight, shape (g, f, c, *kernel), any real dtype, finite.
        option: Fold, number of slices and rank.
        backend: Where to compute.
        stored: The dtype whose precision the weight has, if it is not that of the array (a float32 weight
            with its BatchNorm folded in, as float64).

    Returns:
        Float64 NumPy arrays.

    Raises:
        PlanError: k does not divide the input channels, or j is not between 1 and the full rank.
    """
    channels = weight.shape[2]
    if option.k < 1 or channels % option.k:
        raise PlanError(
            f"k = {option.k} slices do not divide a layer's {channels} input channels per group: "
            "choose a divisor of them."
        )
    svd = _lapack_svd if (stored or weight.dtype) == np.float64 else _gram_svd
    with backend.alone():
        matrices = fold(backend.asarray(weight), option.fold, option.k)
        full = min(matrices.shape[-2:])
        if not 1 <= option.j <= full:
            raise PlanError(
                f"Rank j = {option.j} is out of range for fold {option.fold} with k = {option.k}: choose "
                f"one between 1 and the full rank {full}."
            )
        left, right = balance(*svd(matrices, option.j))
        factors = split(left, right, option.fold, weight.shape)
        return Factors(factors.fold, backend.to_numpy(factors.encoder), backend.to_numpy(factors.decoder))


def _lapack_svd(matrices: Array, j: int) -> tuple[Array, Array, Array]:
    """U, σ and Vᵀ of the j largest singular values."""
    xp = array_namespace(matrices)
    u, sigma, vt = xp.linalg.svd(matrices, full_matrices=False)
    return u[..., :j], sigma[..., :j], vt[..., :j, :]


def _gram_svd(matrices: Array, j: int) -> tuple[Array, Array, Array]:
    """U, σ and Vᵀ of the j largest singular values, from the eigenvectors of the smaller Gram matrix.

    Only the orthonormal U comes from the Gram matrix, and the matrix M itself is projected on it. So
    U · σVᵀ = U Uᵀ M loses no digits to the squared condition number.
    """
    xp = array_namespace(matrices)
    rows, cols = matrices.shape[-2:]
    if rows > cols:
        v, sigma, ut = _gram_svd(xp.matrix_transpose(matrices), j)
        return xp.matrix_transpose(ut), sigma, xp.matrix_transpose(v)
    vectors = eigenvectors(xp.matmul(matrices, xp.matrix_transpose(matrices)))
    u = xp.flip(vectors[..., rows - j :], axis=-1)
    projected = xp.matmul(xp.matrix_transpose(u), matrices)
    sigma = xp.linalg.vector_norm(projected, axis=-1)
    divisor = xp.where(sigma > 0, sigma, xp.ones_like(sigma))
    return u, sigma, projected / divisor[..., None]


def balance(u: Array, sigma: Array, vt: Array) -> tuple[Array, Array]:
    """U√Σ and √ΣVᵀ, with the sign that makes the largest entry of every column of U positive."""
    xp = array_namespace(u)
    positive = xp.max(u, axis=-2) >= -xp.min(u, axis=-2)
    root = xp.sqrt(sigma)
    signed = xp.where(positive, root, -root)
    return u * signed[..., None, :], signed[..., None] * vt


def certify(weight: NDArray[Any], factors: Factors) -> Certificate:
    """Upper bounds, tight to about 1e-9, on the norms of W − Ŵ relative to those of W, per operator group.

    The matrix is that of the encode fold, f × (c · kernel), for factors in any fold. Nothing is estimated:
    every rounding error of this computation, except underflow, is bounded and added. With
    u = 2⁻⁵³ and γ_n = nu / (1 − nu), for any order of summation, with or without fused multiply-add
    (N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., chapters 3 and 10):

    - Residual: a product of inner length j errs by at most γ_j |D||E| (eq. 3.13), in the Frobenius norm
      by γ_j ‖D‖_F ‖E‖_F per slice; subtracting adds u ‖R‖_F.
    - Frobenius norm of an m × n matrix, summed by rows: relative error at most γ_{m+n+2}.
    - Largest σ² of A (n × m, n ≤ m) from above: the computed Gram G errs by at most γ_m ‖A‖²_F. If the
      Cholesky factorization of tI − G runs to its end, then λ_max(G) ≤ t + γ_{n+1} / (1 − γ_{n+1}) ·
      trace(tI − G) (theorem 10.3 and eq. 10.7; S. Rump, Verification of positive definiteness, 2006).
      So the eigenvalue solver need not be trusted: it gives t, and Cholesky proves the bound.
    - Largest σ of W from below: ‖Wᵀx‖ / ‖x‖ for the x of one inverse iteration; any x is a valid bound.

    Args:
        weight: The layer's canonical weight with its BatchNorm folded in, shape (g, f, c, *kernel), of
            float64 or a dtype that float64 holds exactly.
        factors: The factors as stored, in their own dtype.

    Returns:
        The bounds; 0 for a group whose weight and factors are zero, infinite for factors that are not finite.
    """
    exact = factors.astype(np.dtype(np.float64))
    errors = map(_product_error, exact.encoder, exact.decoder)
    return _certified(weight.astype(np.float64), compose(exact), errors)


def certify_weight(weight: NDArray[Any], stored: NDArray[Any]) -> Certificate:
    """The bounds of `certify` for a whole weight in place of factors.

    Args:
        weight: As for `certify`.
        stored: The new weight as stored, in canonical form with the same BatchNorm folded in.
    """
    original = weight.astype(np.float64)
    return _certified(original, stored.astype(np.float64), [0.0] * len(original))


def _certified(
    original: NDArray[np.float64], made: NDArray[np.float64], errors: Iterable[float]
) -> Certificate:
    """Bounds for a weight that is known up to an error in the Frobenius norm, one for every group."""
    residual = original - made
    bounds = [
        _relative_norms(whole.reshape(len(whole), -1), lost.reshape(len(lost), -1), error)
        for whole, lost, error in zip(original, residual, errors, strict=True)
    ]
    return Certificate(
        spectral=tuple(spectral for spectral, _ in bounds),
        frobenius=tuple(frobenius for _, frobenius in bounds),
    )


def certify_product(first: NDArray[Any], second: NDArray[Any], stored: NDArray[Any]) -> Certificate:
    """Upper bounds on the norms of B · A − P relative to those of B · A, for the product P as it is stored.

    The product is computed in float64. Its rounding error is bounded as in `certify`. The norms of the
    computed product, less this error, are lower bounds on the norms of B · A.

    Args:
        first: A, shape (m, n), float64.
        second: B, shape (f, m), float64.
        stored: P in the dtype in which it is stored, shape (f, n).

    Returns:
        The bounds, for one group; infinite if the product may be zero.
    """
    exact = second @ first
    error = _gamma(first.shape[0] + 8) * _frobenius(first).above * _frobenius(second).above
    if not np.any(exact):
        bound = math.inf if error or np.any(stored) else 0.0
        return Certificate((bound,), (bound,))
    spectral, frobenius = _relative_norms(exact, exact - stored.astype(np.float64), error)
    size = _frobenius(exact)
    sizes = _spectral_below(exact, size.above), size.below
    # The norms of B · A are at least those of the computed product less its error.
    shrunk = [max(0.0, 1 - error / size) * (1 - 8 * _UNIT) for size in sizes]
    bounds = [
        math.inf if shrink == 0 else bound / shrink * (1 + 8 * _UNIT)
        for bound, shrink in zip((spectral, frobenius), shrunk, strict=True)
    ]
    return Certificate((bounds[0],), (bounds[1],))


def _relative_norms(
    original: NDArray[np.float64], residual: NDArray[np.float64], error: float
) -> tuple[float, float]:
    """Upper bounds on the spectral and Frobenius norm of a residual that is known up to an error."""
    if not np.any(original):
        bound = math.inf if np.any(residual) else 0.0
        return bound, bound
    # Otherwise, the search for a shift that proves a bound never ends.
    if not math.isfinite(float(np.max(residual)) - float(np.min(residual))):
        return math.inf, math.inf
    original, unit = _normalized(original)
    residual, residual_unit = _normalized(residual)
    shift = residual_unit - unit
    size, residual_size = _frobenius(original), _frobenius(residual)
    spectral = math.ldexp(_spectral_above(residual, residual_size.above), shift)
    frobenius = math.ldexp(residual_size.above, shift)
    error = math.ldexp(error, -unit) + _UNIT * frobenius
    above = (spectral + error) / _spectral_below(original, size.above) * (1 + 8 * _UNIT)
    return above, (frobenius + error) / size.below * (1 + 8 * _UNIT)


def _normalized(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], int]:
    """A matrix divided by a power of two so that its squares do not under- or overflow, and the exponent.

    The division is exact. Almost all matrices are safe, and are returned without a copy.
    """
    exponent = math.frexp(max(float(np.max(matrix)), -float(np.min(matrix))))[1]
    if abs(exponent) <= _SAFE_EXPONENT:
        return matrix, 0
    return np.ldexp(matrix, -exponent), exponent


def _product_error(encoder: NDArray[np.float64], decoder: NDArray[np.float64]) -> float:
    """Upper bound, in the Frobenius norm, on the rounding error of composing one group's factors."""
    k, j = encoder.shape[:2]
    by_slice = (
        _frobenius(encoder[i].reshape(j, -1)).above * _frobenius(decoder[:, i].reshape(-1, j)).above
        for i in range(k)
    )
    return _gamma(j + 8) * math.hypot(*by_slice)


def _gamma(n: int) -> float:
    """Higham's γ_n = nu / (1 − nu), the relative error of n roundings."""
    return n * _UNIT / (1 - n * _UNIT)


class _Bounds(NamedTuple):
    """A lower and an upper bound on a number."""

    below: float
    above: float


def _frobenius(matrix: NDArray[np.float64]) -> _Bounds:
    """Bounds on the Frobenius norm; einsum squares and adds without a temporary of the matrix' size."""
    norm = math.sqrt(np.sum(np.einsum("ij,ij->i", matrix, matrix)))
    relative = _gamma(sum(matrix.shape) + 4)
    return _Bounds(norm * (1 - relative), norm * (1 + relative))


def _wide(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _spectral_above(matrix: NDArray[np.float64], frobenius: float) -> float:
    """Upper bound on the largest singular value of a matrix, given one on its Frobenius norm."""
    if not np.any(matrix):
        return 0.0
    wide = _wide(matrix)
    n, m = wide.shape
    gram = wide @ wide.T
    top = float(np.linalg.eigvalsh(gram)[-1])
    margin = 2 * n * _gamma(n + 1)  # rounding can make Cholesky fail for a smaller one
    while not _is_positive_definite(top * (1 + margin) * np.eye(n) - gram):
        margin *= 2
    shift = top * (1 + margin)
    above = shift * (1 + n * _gamma(n + 4)) + _gamma(m) * frobenius**2
    return math.sqrt(above) * (1 + 4 * _UNIT)


def _is_positive_definite(matrix: NDArray[np.float64]) -> bool:
    try:
        np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return False
    return True


def _spectral_below(matrix: NDArray[np.float64], frobenius: float) -> float:
    """Lower bound on the largest singular value of a matrix that is not zero; see `_spectral_above`."""
    wide = _wide(matrix)
    n, m = wide.shape
    gram = wide @ wide.T
    shift = float(np.linalg.eigvalsh(gram)[-1]) * (1 + 2 * n * _gamma(n + 1))
    start = np.random.default_rng(0).standard_normal(n)  # fixed; in practice not orthogonal to the top one
    x = np.linalg.solve(shift * np.eye(n) - gram, start)
    x /= np.max(np.abs(x))
    length = float(np.linalg.norm(x)) * (1 + _gamma(n + 4))
    image = float(np.linalg.norm(wide.T @ x)) * (1 - _gamma(m + 4))
    return (image / length - _gamma(n) * frobenius) * (1 - 8 * _UNIT)
