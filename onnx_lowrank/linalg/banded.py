"""Eigenvalues of large symmetric matrices, in two stages: to a band, then to the eigenvalues.

LAPACK's direct reduction to a tridiagonal matrix reads the whole matrix for every column, so memory bounds
it. The reduction to a band works on blocks of columns: nearly all of its operations are matrix products
(C. Bischof, B. Lang and X. Sun, A framework for symmetric band reduction, 2000). Both are sequences of
Householder transformations, so the errors of the eigenvalues are the same: a small multiple of
n · 2⁻⁵³ · ‖A‖₂ at most.
"""

from __future__ import annotations

import numpy as np
import scipy
from numpy.typing import NDArray

from onnx_lowrank.linalg.backend import one_blas_thread

Floats = NDArray[np.float64]

LEAST = 3000
"""The least size for which two stages are faster."""

_WIDTH = 48
"""The width of the band: a wider one makes the first stage faster and the second slower."""

_ROWS = 256
"""Rows of a block. Blocks above the diagonal are not kept up to date."""


def eigenvalues(matrix: Floats, width: int = _WIDTH) -> Floats:
    """The eigenvalues of a symmetric matrix, ascending.

    Args:
        matrix: Shape (n, n).
        width: The number of diagonals below the main one in the band, at least 1.
    """
    with one_blas_thread(solvers=True):
        band = _band(matrix, width)
        values = scipy.linalg.eigvals_banded(band, lower=True, overwrite_a_band=True, check_finite=False)
    return np.asarray(values, np.float64)


def _band(matrix: Floats, width: int) -> Floats:
    """The lower diagonals, shape (width + 1, n), of a band matrix with the same eigenvalues.

    Every step takes `width` columns. The transformation Q = I − V T Vᵀ, which makes their part below the band
    a triangle, changes the rest S to Qᵀ S Q = S − V Xᵀ − X Vᵀ, with Y = S V T and X = Y − V Tᵀ Vᵀ Y / 2. The
    code holds the transposes of V, X and Y.
    """
    work = np.array(matrix, np.float64, order="C")
    size = len(work)
    for begin in range(0, size - width, width):
        end = begin + width
        rows, inverse, triangle = _reflectors(work[end:, begin:end])
        work[end:, begin:end] = 0
        work[end : end + len(triangle), begin:end] = triangle
        rest = work[end:, end:]
        x = _solved(inverse, _product(rows, rest))
        x -= _solved(inverse, rows @ x.T).T @ (rows / 2)
        left, right = np.vstack((rows, x)).T, np.vstack((x, rows))
        for row in range(0, size - end, _ROWS):
            block = rest[row : row + _ROWS, : row + _ROWS]
            block -= left[row : row + _ROWS] @ right[:, : row + _ROWS]
    lower = np.zeros((min(width, size - 1) + 1, size))
    for offset, diagonal in enumerate(lower):
        diagonal[: size - offset] = np.diagonal(work, -offset)
    return lower


def _reflectors(panel: Floats) -> tuple[Floats, Floats, Floats]:
    """Vᵀ and T⁻¹ of the transformation I − V T Vᵀ of a panel to a triangle, and the triangle."""
    (raw, factors), triangle = scipy.linalg.qr(panel, mode="raw", check_finite=False)
    count = min(panel.shape)
    rows = np.array(np.tril(raw[:, :count], -1).T, np.float64, order="C")
    np.fill_diagonal(rows, 1)
    # LAPACK leaves out the reflection of a column that is zero below the diagonal.
    left_out = factors == 0
    rows[left_out] = 0
    # T⁻¹ + T⁻ᵀ = Vᵀ V: X. Sun, Aggregations of elementary transformations, 1996.
    inverse = np.triu(rows @ rows.T, 1)
    np.fill_diagonal(inverse, 1 / np.where(left_out, 1, factors))
    return rows, inverse, np.asarray(triangle[:count], np.float64)


def _solved(inverse: Floats, right: Floats) -> Floats:
    """Tᵀ B."""
    solved: Floats = scipy.linalg.solve_triangular(inverse, right, trans=1, check_finite=False)
    return solved


def _product(left: Floats, symmetric: Floats) -> Floats:
    """B S, from the part of S in and below the diagonal."""
    product = np.empty_like(left)
    for row in range(0, len(symmetric), _ROWS):
        block, some = symmetric[row : row + _ROWS], left[:, row : row + _ROWS]
        # The part of a block above the diagonal may lag behind, as the blocks of every step lie elsewhere.
        corner = np.tril(block[:, row : row + _ROWS])
        product[:, row : row + _ROWS] = some @ corner + some @ np.tril(corner, -1).T
        product[:, row : row + _ROWS] += left[:, :row] @ block[:, :row].T
        product[:, :row] += some @ block[:, :row]
    return product
