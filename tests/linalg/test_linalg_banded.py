"""Eigenvalues by way of a band."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.linalg.banded import eigenvalues


def symmetric(size: int, values: np.ndarray, seed: int = 0) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]
    product = q @ (values[:, None] * q.T)
    return (product + product.T) / 2


@pytest.mark.parametrize("width", [1, 5, 48])
@pytest.mark.parametrize("size", [1, 2, 7, 48, 49, 97, 300])
def test_planted_eigenvalues_are_found(size: int, width: int) -> None:
    values = np.sort(np.random.default_rng(size).standard_normal(size))
    found = eigenvalues(symmetric(size, values), width)
    np.testing.assert_allclose(found, values, rtol=0, atol=1e-13)


def test_the_matrix_stays_as_it_is() -> None:
    matrix = symmetric(60, np.arange(60.0))
    copy = matrix.copy()
    eigenvalues(matrix, 7)
    np.testing.assert_array_equal(matrix, copy)


@pytest.mark.parametrize(
    "matrix", [np.zeros((50, 50)), np.eye(50), np.diag(np.arange(50.0)), np.ones((50, 50))]
)
def test_columns_without_anything_to_reflect(matrix: np.ndarray) -> None:
    np.testing.assert_allclose(eigenvalues(matrix, 8), np.linalg.eigvalsh(matrix), rtol=0, atol=1e-12)


def test_small_eigenvalues_are_as_exact_as_those_of_lapack() -> None:
    values = np.sort(np.logspace(0, -15, 120))
    error = np.abs(eigenvalues(symmetric(120, values), 16) - values)
    assert error.max() < 120 * 2.0**-53
