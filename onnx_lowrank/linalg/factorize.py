"""The factors of one layer."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array, Factors
from onnx_lowrank.core.option import Option
from onnx_lowrank.errors import PlanError
from onnx_lowrank.linalg import native
from onnx_lowrank.linalg.backend import LARGE, Backend, array_namespace, eigenvectors, one_blas_thread
from onnx_lowrank.linalg.folding import fold, side, split
from onnx_lowrank.linalg.gram import column_blocks, row_grams

_MANY = 512
"""The least number of eigenvectors of which a part is computed alone."""


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
            f"A layer's {channels} input channels per group cannot be cut into k = {option.k} slices: "
            "choose a divisor of them."
        )
    is_exact = (stored or weight.dtype) == np.float64
    with backend.lane(side(weight.shape, option.fold, option.k)) as place:
        array = place.asarray(weight) if is_exact else place.held(weight)
        matrices = fold(array, option.fold, option.k)
        full = min(matrices.shape[-2:])
        if not 1 <= option.j <= full:
            raise PlanError(
                f"Rank j = {option.j} is out of range for fold {option.fold} with k = {option.k}: choose "
                f"one between 1 and the full rank {full}."
            )
        parts = _lapack_svd(matrices, option.j) if is_exact else _gram_svd(matrices, option.j, place)
        left, right = balance(*parts)
        factors = split(left, right, option.fold, weight.shape)
        return Factors(factors.fold, place.to_numpy(factors.encoder), place.to_numpy(factors.decoder))


def _lapack_svd(matrices: Array, j: int) -> tuple[Array, Array, Array]:
    """U, σ and Vᵀ of the j largest singular values."""
    xp = array_namespace(matrices)
    u, sigma, vt = xp.linalg.svd(matrices, full_matrices=False)
    return u[..., :j], sigma[..., :j], vt[..., :j, :]


def _gram_svd(matrices: Array, j: int, backend: Backend) -> tuple[Array, Array, Array]:
    """U, σ and Vᵀ of the j largest singular values, from the eigenvectors of the smaller Gram matrix.

    Only the orthonormal U comes from the Gram matrix, and the matrix M itself is projected on it. So
    U · σVᵀ = U Uᵀ M loses no digits to the squared condition number. Large slices are shared among idle
    threads.
    """
    xp = array_namespace(matrices)
    *stack, rows, cols = matrices.shape
    if rows > cols:
        v, sigma, ut = _gram_svd(xp.matrix_transpose(matrices), j, backend)
        return xp.matrix_transpose(ut), sigma, xp.matrix_transpose(v)
    if xp is not np or backend.shared is None or rows < LARGE:
        return _projected(matrices, j, backend)
    flat = matrices.reshape(-1, rows, cols)
    slices = backend.shared(lambda n: _projected(flat[n], j, backend), len(flat))
    u, sigma, vt = (np.array(parts).reshape(*stack, *parts[0].shape) for parts in zip(*slices, strict=True))
    return u, sigma, vt


def _projected(matrices: Array, j: int, backend: Backend) -> tuple[Array, Array, Array]:
    """As `_gram_svd`, for matrices that are not higher than wide."""
    xp = array_namespace(matrices)
    u = xp.flip(_top_eigenvectors(row_grams(matrices, backend), j), axis=-1)
    transposed = xp.matrix_transpose(u)
    projected = xp.concat([xp.matmul(transposed, part) for part in column_blocks(matrices)], axis=-1)
    # Not `vector_norm`: CuPy compiles a kernel for it, which takes longer than all factors of a model.
    sigma = xp.sqrt(xp.sum(projected * projected, axis=-1))
    divisor = xp.where(sigma > 0, sigma, xp.ones_like(sigma))
    return u, sigma, projected / divisor[..., None]


def _top_eigenvectors(grams: Array, j: int) -> Array:
    """The eigenvectors of the j largest eigenvalues, by ascending eigenvalues; for few of many only these."""
    *stack, size, _ = grams.shape
    if array_namespace(grams) is not np or size < _MANY or 2 * j > size:
        return eigenvectors(grams)[..., size - j :]
    try:
        with one_blas_thread(solvers=True):
            vectors = [native.top_eigenvectors(gram, j) for gram in grams.reshape(-1, size, size)]
    except np.linalg.LinAlgError:  # The method for all of them is slower, and seldom fails.
        return eigenvectors(grams)[..., size - j :]
    return np.array(vectors).reshape(*stack, size, j)


def balance(u: Array, sigma: Array, vt: Array) -> tuple[Array, Array]:
    """U√Σ and √ΣVᵀ, with the sign that makes the largest entry of every column of U positive."""
    xp = array_namespace(u)
    positive = xp.max(u, axis=-2) >= -xp.min(u, axis=-2)
    root = xp.sqrt(sigma)
    signed = xp.where(positive, root, -root)
    return u * signed[..., None, :], signed[..., None] * vt
