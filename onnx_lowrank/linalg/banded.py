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

from onnx_lowrank.linalg import native
from onnx_lowrank.linalg.backend import one_blas_thread

Floats = NDArray[np.float64]

LEAST = 1800
"""The least size for which two stages are faster."""

_WIDTH = 64
"""The width of the band: a wider one makes the first stage faster and the second slower."""


def eigenvalues(matrix: Floats, width: int = _WIDTH) -> Floats:
    """The eigenvalues of a symmetric matrix, ascending.

    Args:
        matrix: Shape (n, n).
        width: The number of diagonals beside the main one in the band, at least 1.
    """
    with one_blas_thread(solvers=True):
        return native.eigenvalues_of_band(_band(matrix, width))


def _band(matrix: Floats, width: int) -> Floats:
    """The upper diagonals of a band matrix with the same eigenvalues, as the columns of (n, width + 1).

    Every step takes `width` rows. The transformation Q = I − V T Vᵀ, which makes their part beside the band
    a triangle, changes the rest S to Qᵀ S Q = S − V Xᵀ − X Vᵀ, with Y = S V T and X = Y − V Tᵀ Vᵀ Y / 2. The
    code holds the transposes of V, X and Y, and the part of S above its diagonal.
    """
    work = np.array(matrix, np.float64, order="C")
    size = len(work)
    for begin in range(0, size - width, width):
        end = begin + width
        rows, mixed, triangle = _reflectors(work[begin:end, end:])
        work[begin:end, end:] = 0
        work[begin:end, end : end + triangle.shape[1]] = triangle
        rest = work[end:, end:]
        x = mixed.T @ native.product(rows, rest)
        x -= (mixed.T @ (rows @ x.T)).T @ (rows / 2)
        native.subtract(rest, rows, x)
    band = np.zeros((size, min(width, size - 1) + 1))
    for offset in range(band.shape[1]):
        band[: size - offset, offset] = np.diagonal(work, offset)
    return band


def _reflectors(panel: Floats) -> tuple[Floats, Floats, Floats]:
    """Vᵀ and T of the transformation I − V T Vᵀ of a panel's columns to a triangle, and the triangle.

    Args:
        panel: The transpose of these columns, shape (width, n).
    """
    raw, factors = np.linalg.qr(panel.T, mode="raw")
    count = min(panel.shape)
    rows = np.array(np.triu(raw[:count], 1), order="C")  # of NumPy, raw has contiguous columns
    np.fill_diagonal(rows, 1)
    # LAPACK leaves out the reflection of a column that is zero below the diagonal.
    left_out = factors == 0
    rows[left_out] = 0
    # T⁻¹ + T⁻ᵀ = Vᵀ V: X. Sun, Aggregations of elementary transformations, 1996.
    inverse = np.triu(rows @ rows.T, 1)
    np.fill_diagonal(inverse, 1 / np.where(left_out, 1, factors))
    mixed = scipy.linalg.solve_triangular(inverse, np.eye(count), check_finite=False)
    return rows, mixed, np.tril(raw[:, :count])
