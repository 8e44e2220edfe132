"""Variable projection: the encoder is the only unknown, because least squares give its decoder.

P maps patches to (rank, slice, tap). It is n × p with n = j · k · taps; taps are the positions of the
decoder's kernel. P holds the encoder E_i of a slice where the slice and tap of the patch equal those of the
row, and zeros elsewhere. P is never built: products with it run over slices and taps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, prod

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Array
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg.backend import Backend, array_namespace, eigenvalues, eigenvectors, solve_triangular
from onnx_lowrank.linalg.folding import fold as fold_slices
from onnx_lowrank.linalg.quadratic import Quadratic
from onnx_lowrank.linalg.spectra import diagonal_blocks

_ROUND = 3  # iterations between two evaluations of the score
_PATIENCE = 2  # the refinement ends after so many evaluations in a row without a lower score
_EPSILON = 2.0**-52

Score = Callable[[Array], float]
"""Gives the score of an encoder, which decides when the minimization of the error ends."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A quadratic on the device, its patches in the order (slice, tap, column): p = k · taps · q.

    Attributes:
        second: C, shape (g, k, taps, q, p).
        cross: X folded, shape (g, k, f · taps, q).
        optimum: The minimizer folded, shape (g, k, f · taps, q).
        power: Σ_g a.
        f: Output features per operator group.
    """

    second: Array
    cross: Array
    optimum: Array
    power: float
    f: int


@dataclass(frozen=True, slots=True)
class Solution:
    """The best decoder of an encoder.

    Attributes:
        left: The decoder as matrices, shape (g, k, f · taps, j).
        value: The error e.
        gradient: Gives the gradient of e by the encoder, shape (g, k, j, q).
    """

    left: Array
    value: float
    gradient: Callable[[], Array]


def folded(quadratic: Quadratic, shape: tuple[int, ...], fold: Fold, k: int, backend: Backend) -> Problem:
    """Put a quadratic of a canonical weight's shape (g, f, c, *kernel) on the device, folded in k slices."""
    g, f, c, *kernel = shape
    p = c * prod(kernel)
    order = fold_slices(np.arange(p).reshape(1, 1, c, *kernel), fold, k)
    taps, q = order.shape[-2:]
    second = backend.asarray(quadratic.second)
    xp = array_namespace(second)
    if taps > 1:
        index = xp.asarray(order.reshape(-1))
        second = xp.take(xp.take(second, index, axis=1), index, axis=2)
    return Problem(
        second=xp.reshape(second, (g, k, taps, q, p)),
        cross=fold_slices(xp.reshape(backend.asarray(quadratic.cross), shape), fold, k),
        optimum=fold_slices(xp.reshape(backend.asarray(quadratic.optimum), shape), fold, k),
        power=float(np.sum(quadratic.power)),
        f=f,
    )


def encoder(problem: Problem, j: int) -> Array:
    """E_i = Uᵀ M_i for the j top eigenvectors U of M_i K_i M_iᵀ, best first: shape (g, k, j, q).

    K_i is the mean over the taps of the moments of the columns. Where M_i is higher than wide, its R
    factor stands for it: M = Q R has U = Q U_R, so Uᵀ M = U_Rᵀ R.
    """
    matrices, weighted = _weighted(problem)
    vectors = eigenvectors(weighted)
    xp = array_namespace(vectors)
    u = xp.flip(vectors[..., vectors.shape[-1] - j :], axis=-1)
    return xp.matmul(xp.matrix_transpose(u), matrices)


def is_exact(problem: Problem) -> bool:
    """Whether no other encoder has less error than that of `encoder`: with one slice and one tap."""
    _, k, taps, _, _ = problem.second.shape
    return bool(k * taps == 1)


def exact_gains(problem: Problem, j: int, backend: Backend) -> Array:
    """The result of `gains` for an encoder that is exact: the j largest eigenvalues of M C Mᵀ."""
    _, weighted = _weighted(problem)
    xp = array_namespace(weighted)
    values = eigenvalues(weighted, backend)
    return xp.sum(xp.flip(values, axis=-1)[..., :j], axis=(0, 1))


def gains(problem: Problem, encoder: Array) -> Array:
    """The amounts by which each further rank lowers e: shape (j,).

    With G = L Lᵀ, the best decoder lowers e by ‖L⁻¹ P Xᵀ‖² in total. The rank is the slowest index of the
    rows of P, so the leading blocks of L are the factors of the smaller encoders. So the squares, summed over
    the rows of one rank, are its gain.
    """
    xp = array_namespace(encoder)
    gram, moments = _normal_equations(problem, encoder, _image(problem, encoder))
    scale, lower = _cholesky(problem, encoder, gram)
    squares = solve_triangular(lower, scale * moments) ** 2
    return xp.sum(xp.reshape(squares, (gram.shape[0], encoder.shape[2], -1)), axis=(0, 2))


def solve(problem: Problem, encoder: Array) -> Solution:
    """The best decoder D = X Pᵀ G⁻¹ of an encoder of shape (g, k, j, q).

    The gradient of e is the one at a fixed decoder, because D minimizes e. By P it is −2 Dᵀ(X − D P C); by
    the encoder it is the sum of its blocks over the taps.
    """
    xp = array_namespace(encoder)
    g, k, taps, q, _ = problem.second.shape
    j, f = encoder.shape[2], problem.f
    image = _image(problem, encoder)
    gram, moments = _normal_equations(problem, encoder, image)
    scale, lower = _cholesky(problem, encoder, gram)
    halfway = solve_triangular(lower, scale * moments)
    decoder = scale * solve_triangular(lower, halfway, transposed=True)
    left = xp.permute_dims(xp.reshape(decoder, (g, j, k, taps, f)), (0, 2, 4, 3, 1))
    left = xp.reshape(left, (g, k, f * taps, j))

    def gradient() -> Array:
        fitted = xp.reshape(xp.matmul(xp.matrix_transpose(decoder), image), (g, f, k, taps, q))
        fitted = xp.reshape(xp.permute_dims(fitted, (0, 2, 1, 3, 4)), (g, k, f * taps, q))
        return -2 * xp.matmul(xp.matrix_transpose(left), problem.cross - fitted)

    return Solution(left, problem.power - float(xp.sum(decoder * moments)), gradient)


def refine(problem: Problem, encoder: Array, backend: Backend, score: Score | None, steps: int) -> Array:
    """The encoder after L-BFGS iterations on e; every evaluation solves for the decoder.

    G. Golub and V. Pereyra, The differentiation of pseudo-inverses and nonlinear least squares problems
    whose variables separate, 1973.

    Args:
        problem: The error to minimize.
        encoder: The first iterate, shape (g, k, j, q).
        backend: Where to compute.
        score: The iterations end when it no longer falls, and the encoder with the least score is returned.
            Without it, the last encoder is returned.
        steps: The most iterations.
    """
    start = solve(problem, encoder).value
    # The gradient of an exact encoder is only rounding errors, which L-BFGS would follow.
    if start <= _EPSILON * problem.power:
        return encoder
    shape = encoder.shape

    def objective(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        found = solve(problem, backend.asarray(x.reshape(shape)))
        return found.value / start, backend.to_numpy(found.gradient()).reshape(-1) / start

    kept = _Lowest(encoder, score, backend)
    result = scipy.optimize.minimize(
        objective,
        backend.to_numpy(encoder).reshape(-1),
        jac=True,
        method="L-BFGS-B",
        callback=kept.look,
        options={"maxiter": steps},
    )
    return kept.best(result.x)


class _Lowest:
    """Keeps the iterate with the least score, evaluated every few iterations; without a score, the last."""

    def __init__(self, encoder: Array, score: Score | None, backend: Backend) -> None:
        self._encoder = encoder
        self._score = score
        self._backend = backend
        self._lowest = inf if score is None else score(encoder)
        self._iterations = 0
        self._misses = 0

    def look(self, intermediate_result: scipy.optimize.OptimizeResult) -> None:
        """SciPy's callback: ends the minimization when the score no longer falls."""
        self._iterations += 1
        if self._score is None or self._iterations % _ROUND:
            return
        self._misses = 0 if self._falls(intermediate_result.x) else self._misses + 1
        if self._misses == _PATIENCE:
            raise StopIteration

    def best(self, last: NDArray[np.float64]) -> Array:
        """The encoder to use, given the last iterate."""
        self._falls(last)
        return self._encoder

    def _falls(self, x: NDArray[np.float64]) -> bool:
        encoder = self._backend.asarray(x.reshape(self._encoder.shape).copy())
        value = -inf if self._score is None else self._score(encoder)
        if value >= self._lowest:
            return False
        self._encoder, self._lowest = encoder, value
        return True


def _weighted(problem: Problem) -> tuple[Array, Array]:
    """M_i, or its R factor where M_i is higher than wide, and M_i K_i M_iᵀ; see `encoder`."""
    g, k, taps, q, p = problem.second.shape
    xp = array_namespace(problem.second)
    blocks = diagonal_blocks(xp.reshape(problem.second, (g, 1, p, p)), k * taps)
    columns = xp.mean(xp.reshape(blocks, (g, k, taps, q, q)), axis=2)
    matrices = problem.optimum
    if matrices.shape[-2] > q:
        _, matrices = xp.linalg.qr(matrices)
    return matrices, matrices @ columns @ xp.matrix_transpose(matrices)


def _image(problem: Problem, encoder: Array) -> Array:
    """P C, shape (g, n, p)."""
    xp = array_namespace(encoder)
    product = xp.matmul(encoder[:, :, None, :, :], problem.second)
    g, k, taps, j, p = product.shape
    return xp.reshape(xp.permute_dims(product, (0, 3, 1, 2, 4)), (g, j * k * taps, p))


def _normal_equations(problem: Problem, encoder: Array, image: Array) -> tuple[Array, Array]:
    """G = P C Pᵀ and P Xᵀ, shapes (g, n, n) and (g, n, f)."""
    xp = array_namespace(encoder)
    g, k, taps, q, _ = problem.second.shape
    n, j, f = image.shape[1], encoder.shape[2], problem.f
    transposed = xp.matrix_transpose(encoder)
    by_slice = xp.permute_dims(xp.reshape(image, (g, n, k, taps, q)), (0, 2, 1, 3, 4))
    gram = xp.matmul(xp.reshape(by_slice, (g, k, n * taps, q)), transposed)
    gram = xp.permute_dims(xp.reshape(gram, (g, k, n, taps, j)), (0, 2, 4, 1, 3))
    moments = xp.reshape(xp.matmul(problem.cross, transposed), (g, k, f, taps, j))
    moments = xp.permute_dims(moments, (0, 4, 1, 3, 2))
    return xp.reshape(gram, (g, n, n)), xp.reshape(moments, (g, n, f))


def _cholesky(problem: Problem, encoder: Array, gram: Array) -> tuple[Array, Array]:
    """Scale s and L with L Lᵀ = s G sᵀ + εI, shapes (g, n, 1) and (g, n, n).

    The scale makes rows have length 1 and patches have mean power 1. So the rounding errors of G have the
    size of the unit roundoff, even if C is singular and G is only rounding errors. ε starts at that size and
    grows until the factorization succeeds. It acts as a ridge on C, far below any requested ridge.
    """
    xp = array_namespace(gram)
    g, k, taps, _, p = problem.second.shape
    n, j = gram.shape[-1], encoder.shape[2]
    power = xp.linalg.trace(xp.reshape(problem.second, (g, p, p))) / p
    squares = xp.sum(encoder**2, axis=-1) * power[:, None, None]
    squares = xp.where(squares > 0, squares, xp.ones_like(squares))
    rows = xp.broadcast_to(xp.matrix_transpose(squares)[..., None], (g, j, k, taps))
    scale = 1 / xp.sqrt(xp.reshape(rows, (g, n, 1)))
    scaled = gram * scale * xp.matrix_transpose(scale)
    identity = xp.eye(n, dtype=gram.dtype)
    # Not 0: by chance of rounding, the factorization may succeed for a singular C, and its solution is noise.
    jitter = 4 * n * _EPSILON
    while (lower := _try_cholesky(scaled + jitter * identity)) is None:
        jitter *= 10
    return scale, lower


def _try_cholesky(matrix: Array) -> Array | None:
    """L, or None if the matrix is not positive definite, for which not all libraries raise an error."""
    xp = array_namespace(matrix)
    try:
        lower = xp.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        return None
    # Not `all`: CuPy takes seconds to compile it.
    return lower if float(xp.min(xp.linalg.diagonal(lower))) > 0 else None
