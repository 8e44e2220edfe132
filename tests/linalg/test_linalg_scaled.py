"""The factors of ASVD and SVD-LLM against singular value decompositions in float64, as in the papers."""

import numpy as np
import pytest
from activation_reference import moments, samples

from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg.activations import errors, fit
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import of_weight
from onnx_lowrank.linalg.scaled import of_scaled, sizes

CPU = resolve("cpu")
SHAPES = [(1, 12, 9), (1, 6, 20), (1, 8, 3, 3, 2), (2, 5, 7)]


def problem(shape, seed=0):
    rng = np.random.default_rng(seed)
    x = samples(shape[0], int(np.prod(shape[2:])), 300, seed + 1)
    return rng.standard_normal(shape), x


def truncated(matrix, scaling, rank):
    """The best approximation of matrix · scaling of this rank, times the inverse of the scaling."""
    u, s, vt = np.linalg.svd(matrix @ scaling)
    residual = np.sum(s[rank:] ** 2) / np.sum(s**2)
    return u[:, :rank] * s[:rank] @ vt[:rank] @ np.linalg.inv(scaling), residual


@pytest.mark.parametrize("shape", SHAPES)
def test_sizes_are_root_mean_squares(shape):
    _, x = problem(shape)
    np.testing.assert_allclose(sizes(moments(x)), np.sqrt(np.mean(x**2, axis=1)), rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_scaled_factors_are_those_of_asvd(shape, rank):
    weight, x = problem(shape)
    quadratic = of_scaled(weight, moments(x))
    product = compose(fit(quadratic, shape, Option(Fold.ENCODE, 1, rank), CPU))
    found = errors(quadratic, shape, Fold.ENCODE, 1, rank, CPU)
    lost = []
    for group, inputs in enumerate(x):
        # S holds the size to the power ½.
        scaling = np.diag(np.sqrt(np.sqrt(np.mean(inputs**2, axis=0))))
        wanted, residual = truncated(weight[group].reshape(shape[1], -1), scaling, rank)
        np.testing.assert_allclose(product[group].reshape(wanted.shape), wanted, atol=1e-5)
        lost.append(residual)
    if shape[0] == 1:
        assert found[rank] == pytest.approx(lost[0], rel=1e-5)


def test_inputs_of_one_size_give_the_plain_decomposition():
    weight, x = problem((1, 8, 8))
    x = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True))
    product = compose(fit(of_scaled(weight, moments(x)), weight.shape, Option(Fold.ENCODE, 1, 3), CPU))
    wanted, _ = truncated(weight[0], np.eye(8), 3)
    np.testing.assert_allclose(product[0], wanted, atol=1e-9)


def test_an_input_that_is_always_zero_has_no_say():
    weight, x = problem((1, 8, 5))
    x[:, :, 2] = 0
    product = compose(fit(of_scaled(weight, moments(x)), weight.shape, Option(Fold.ENCODE, 1, 4), CPU))
    assert np.isfinite(product).all()
    np.testing.assert_allclose(np.delete(product, 2, axis=2), np.delete(weight, 2, axis=2), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_factors_of_activations_are_those_of_svd_llm(shape, rank):
    """The singular value decomposition of W L, with L Lᵀ = E[x xᵀ] and the ridge."""
    weight, x = problem(shape)
    quadratic = of_weight(weight, moments(x), centred=False, ridge=1e-3)
    product = compose(fit(quadratic, shape, Option(Fold.ENCODE, 1, rank), CPU))
    for group, inputs in enumerate(x):
        second = inputs.T @ inputs / len(inputs)
        whitening = np.linalg.cholesky(second + 1e-3 * np.trace(second) / len(second) * np.eye(len(second)))
        wanted, _ = truncated(weight[group].reshape(shape[1], -1), whitening, rank)
        np.testing.assert_allclose(product[group].reshape(wanted.shape), wanted, atol=1e-9)
