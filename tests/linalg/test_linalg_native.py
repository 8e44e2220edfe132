"""Routines of BLAS and LAPACK that are called by their addresses."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.linalg import native


def part(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric matrix of integers; and its upper part in a larger matrix, with other numbers below."""
    rng = np.random.default_rng(size)
    whole = np.triu(rng.integers(-5, 6, (size, size))).astype(np.float64)
    larger = rng.integers(-5, 6, (size + 3, size + 4)).astype(np.float64)
    upper = larger[2 : 2 + size, 1 : 1 + size]
    upper[np.triu_indices(size)] = whole[np.triu_indices(size)]
    return np.triu(whole) + np.triu(whole, 1).T, upper


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_a_product_reads_the_upper_part(size: int, count: int) -> None:
    whole, upper = part(size)
    rows = np.random.default_rng(1).integers(-5, 6, (count, size)).astype(np.float64)
    np.testing.assert_array_equal(native.product(rows, upper), rows @ whole)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 9])
def test_an_update_changes_the_upper_part_alone(size: int, count: int) -> None:
    whole, upper = part(size)
    below = np.tril(upper, -1)
    left, right = np.random.default_rng(2).integers(-5, 6, (2, count, size)).astype(np.float64)
    native.subtract(upper, left, right)
    np.testing.assert_array_equal(np.triu(upper), np.triu(whole - left.T @ right - right.T @ left))
    np.testing.assert_array_equal(np.tril(upper, -1), below)


@pytest.mark.parametrize("width", [0, 1, 3])
@pytest.mark.parametrize("size", [1, 2, 20])
def test_the_eigenvalues_of_a_band(size: int, width: int) -> None:
    width = min(width, size - 1)
    band = np.random.default_rng(3).standard_normal((size, width + 1))
    matrix = np.zeros((size, size))
    for offset in range(width + 1):
        places = np.arange(size - offset)
        matrix[places, places + offset] = matrix[places + offset, places] = band[: size - offset, offset]
    found = native.eigenvalues_of_band(band)
    np.testing.assert_allclose(found, np.linalg.eigvalsh(matrix), rtol=0, atol=1e-13)


def test_numbers_that_are_none_are_told() -> None:
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        native.eigenvalues_of_band(np.full((5, 3), np.nan))


@pytest.mark.parametrize("count", [1, 3, 20])
@pytest.mark.parametrize("rank", [0, 2, 20])
@pytest.mark.parametrize("scale", [1e-70, 1.0, 1e70])
def test_top_eigenvectors_span_what_the_largest_eigenvalues_hold(scale: float, rank: int, count: int) -> None:
    rng = np.random.default_rng(4)
    basis = np.linalg.qr(rng.standard_normal((20, 20)))[0]
    values = np.where(np.arange(20) < rank, 20.0 - np.arange(20), 0) * scale
    matrix = (basis * values) @ basis.T
    before = matrix.copy()
    vectors = native.top_eigenvectors((matrix + matrix.T) / 2, count)
    np.testing.assert_array_equal(matrix, before)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), rtol=0, atol=1e-13)
    found = np.einsum("ij,ik,kj->j", vectors, matrix, vectors)
    np.testing.assert_allclose(found, values[:count][::-1], rtol=0, atol=1e-13 * 20 * scale)


def test_eigenvectors_of_numbers_that_are_none_are_told() -> None:
    with pytest.raises(np.linalg.LinAlgError, match="did not converge"):
        native.top_eigenvectors(np.full((5, 5), np.nan), 2)
