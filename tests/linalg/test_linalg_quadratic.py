"""The quadratic of a layer against means over the very samples it was made from."""

import math

import numpy as np
import pytest
from activation_reference import moments, samples, targets

from onnx_lowrank.core.factors import Moments, Targets
from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg.quadratic import Quadratic, best_ridge, error, of_targets, of_weight, shrinkage

SHAPES = [(1, 5, 7), (3, 4, 2), (1, 3, 2, 3), (2, 4, 3, 2, 2)]


def drawn(shape, count, seed):
    """A weight, another one, inputs and noisy outputs of the first."""
    rng = np.random.default_rng(seed)
    g, f, *rest = shape
    weight, other = rng.standard_normal((2, *shape))
    x = samples(g, math.prod(rest), count, seed + 1)
    y = x @ np.swapaxes(weight.reshape(g, f, -1), 1, 2) + rng.standard_normal((g, count, f)) + 3
    return weight, other, x, y


def mean_square(residual, centred):
    """The mean over the samples of the squared length, summed over groups."""
    if centred:
        residual = residual - residual.mean(axis=1, keepdims=True)
    return np.sum(residual**2) / residual.shape[1]


def applied(weight, x):
    return x @ np.swapaxes(weight.reshape(*weight.shape[:2], -1), 1, 2)


def ridge_term(difference, second, ridge):
    """λ ‖W − Ŵ‖², summed over groups."""
    level = ridge * np.trace(second, axis1=1, axis2=2) / second.shape[-1]
    return np.sum(level * np.sum(difference.reshape(len(level), -1) ** 2, axis=1))


def uncentred(x):
    return np.swapaxes(x, 1, 2) @ x / x.shape[1]


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_a_weight_is_the_mean_over_the_samples(shape, centred, ridge):
    weight, other, x, _ = drawn(shape, 60, seed=0)
    inputs = moments(x)
    before = inputs.second.copy(), weight.copy()
    second = inputs.second if centred else uncentred(x)
    expected = mean_square(applied(weight - other, x), centred) + ridge_term(weight - other, second, ridge)
    total = mean_square(applied(weight, x), centred) + ridge_term(weight, second, ridge)
    quadratic = of_weight(weight, inputs, centred=centred, ridge=ridge)
    assert error(quadratic, other) == pytest.approx(expected / total, rel=1e-11)
    assert error(quadratic, other.reshape(*shape[:2], -1)) == error(quadratic, other)
    assert error(quadratic, weight) < 1e-14
    assert error(quadratic, np.zeros(shape)) == 1
    np.testing.assert_array_equal(inputs.second, before[0])
    np.testing.assert_array_equal(weight, before[1])


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_error_of_targets_is_the_mean_over_the_samples(shape, centred, ridge):
    weight, other, x, y = drawn(shape, 60, seed=2)
    inputs, wanted = moments(x), targets(y, x)
    before = inputs.second.copy(), wanted.cross.copy()
    second = inputs.second if centred else uncentred(x)
    expected = mean_square(y - applied(other, x), centred) + ridge_term(weight - other, second, ridge)
    total = mean_square(y, centred) + ridge_term(weight, second, ridge)
    quadratic = of_targets(weight, inputs, wanted, centred=centred, ridge=ridge)
    assert error(quadratic, other) == pytest.approx(expected / total, rel=1e-11)
    np.testing.assert_array_equal(inputs.second, before[0])
    np.testing.assert_array_equal(wanted.cross, before[1])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimum_is_the_regression_of_the_samples(shape, centred):
    weight, _, x, y = drawn(shape, 80, seed=4)
    quadratic = of_targets(weight, moments(x), targets(y, x), centred=centred, ridge=0.0)
    for group in range(shape[0]):
        left, right = x[group], y[group]
        if centred:
            left, right = left - left.mean(axis=0), right - right.mean(axis=0)
        expected = np.linalg.lstsq(left, right, rcond=None)[0].T
        np.testing.assert_allclose(quadratic.optimum[group], expected, rtol=1e-6, atol=1e-9)
    best = error(quadratic, quadratic.optimum)
    for seed in range(5):
        step = 1e-3 * np.random.default_rng(seed).standard_normal(quadratic.optimum.shape)
        assert error(quadratic, quadratic.optimum + step) > best


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_too_few_samples_the_optimum_is_that_of_least_norm(shape, count):
    weight, _, x, y = drawn(shape, count, seed=6)
    quadratic = of_targets(weight, moments(x), targets(y, x), centred=False, ridge=0.0)
    for group in range(shape[0]):
        expected = np.linalg.lstsq(x[group], y[group], rcond=None)[0].T
        np.testing.assert_allclose(quadratic.optimum[group], expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_optimum_of_a_weight_is_the_weight_itself(shape):
    weight, _, x, _ = drawn(shape, 3, seed=8)
    optimum = of_weight(weight.astype(np.float32), moments(x), centred=True, ridge=0.0).optimum
    np.testing.assert_array_equal(optimum, weight.astype(np.float32).reshape(*shape[:2], -1))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_large_ridge_draws_the_optimum_to_the_weight(shape):
    weight, _, x, y = drawn(shape, 3, seed=9)
    far = [
        np.linalg.norm(
            of_targets(weight, moments(x), targets(y, x), centred=True, ridge=ridge).optimum
            - weight.reshape(*shape[:2], -1)
        )
        for ridge in (1e-3, 1.0, 1e3, 1e6)
    ]
    assert far == sorted(far, reverse=True)
    assert far[-1] < 1e-5 < far[0]


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_that_are_always_zero_count_as_white(shape, ridge):
    rng = np.random.default_rng(10)
    weight, other = rng.standard_normal((2, *shape))
    quadratic = of_weight(
        weight, moments(np.zeros((shape[0], 4, math.prod(shape[2:])))), centred=True, ridge=ridge
    )
    expected = np.sum((weight - other) ** 2) / np.sum(weight**2)
    assert error(quadratic, other) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dead", [0, 1, 2])
def test_a_group_whose_inputs_are_zero_counts_next_to_nothing(dead):
    weight, other, x, _ = drawn((3, 4, 2), 30, seed=11)
    x[dead] = 0
    quadratic = of_weight(weight, moments(x), centred=True, ridge=0.0)
    alive = [group for group in range(3) if group != dead]
    expected = of_weight(weight[alive], moments(x[alive]), centred=True, ridge=0.0)
    assert error(quadratic, other) == pytest.approx(error(expected, other[alive]), rel=1e-7)
    assert quadratic.power[dead] > 0


def test_error_beside_a_total_of_zero():
    quadratic = of_weight(np.zeros((1, 2, 3)), moments(samples(1, 3, 5, seed=12)), centred=True, ridge=0.1)
    assert error(quadratic, np.zeros((1, 2, 3))) == 0
    assert error(quadratic, np.ones((1, 2, 3))) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("field", range(3))
def test_moments_that_are_not_finite_are_an_input_error(field, value):
    arrays = [np.ones((1, 2, 2)), np.ones((1, 3, 2)), np.ones(1)]
    arrays[field].flat[0] = value
    with pytest.raises(InputError, match="not finite in float64: look for NaN"):
        Quadratic(*arrays)


GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("count", [2, 6, 20, 200])
@pytest.mark.parametrize("shape", SHAPES)
def test_best_ridge_is_the_best_of_the_grid(shape, count, centred):
    weight, other, x, y = drawn(shape, count + 20, seed=13)
    y = y + 0.3 * applied(other, x)
    fitted, held = slice(count), slice(count, None)
    parts = [(moments(x[:, part]), targets(y[:, part], x[:, part])) for part in (fitted, held)]
    found = best_ridge(weight, *parts[0], *parts[1], centred=centred)
    exact = of_targets(weight, *parts[1], centred=centred, ridge=0.0)
    scores = {
        ridge: error(exact, of_targets(weight, *parts[0], centred=centred, ridge=ridge).optimum)
        for ridge in GRID
    }
    assert found in GRID
    assert scores[found] == pytest.approx(min(scores.values()), rel=1e-7)


@pytest.mark.parametrize("seed", range(12))
def test_sums_of_many_features_judge_a_ridge_as_well_as_all_of_them(seed):
    weight, other, x, y = drawn((1, 700, 30), 90, seed=seed)
    y = y + np.random.default_rng(seed).uniform(0, 0.3) * applied(other, x)
    parts = [(moments(x[:, part]), targets(y[:, part], x[:, part])) for part in (slice(45), slice(45, None))]
    found = best_ridge(weight, *parts[0], *parts[1], centred=True)
    exact = of_targets(weight, *parts[1], centred=True, ridge=0.0)
    scores = [
        error(exact, of_targets(weight, *parts[0], centred=True, ridge=ridge).optimum) for ridge in GRID
    ]
    spread = max(scores) - min(scores)
    assert spread > 0
    assert scores[GRID.index(found)] <= min(scores) + 0.05 * spread


def test_best_ridge_is_large_for_noise_and_small_for_a_change():
    weight, other, x, _ = drawn((1, 5, 7), 400, seed=14)
    noise = 5 * np.random.default_rng(15).standard_normal((1, 400, 5))
    few, held = slice(9), slice(100, None)

    def chosen(y, part):
        return best_ridge(
            weight,
            moments(x[:, part]),
            targets(y[:, part], x[:, part]),
            moments(x[:, held]),
            targets(y[:, held], x[:, held]),
            centred=True,
        )

    assert chosen(applied(weight, x) + noise, few) == 1.0
    assert chosen(applied(other, x), slice(100)) == 1e-5


def test_best_ridge_of_equally_good_ones_is_the_largest():
    weight = np.ones((1, 2, 3))
    nothing = Moments(4, np.zeros((1, 3)), np.zeros((1, 3, 3)))
    wanted = Targets(np.zeros((1, 2)), np.zeros((1, 2, 3)), np.ones(1))
    assert best_ridge(weight, nothing, wanted, nothing, wanted, centred=True, grid=(0.1, 10.0, 1.0)) == 10.0


def test_shrinkage_falls_with_the_number_of_vectors_and_keeps_its_floor():
    rng = np.random.default_rng(0)
    scale = np.arange(1, 21)
    found = []
    for count in (10, 100, 10_000):
        known = moments(rng.standard_normal((1, count, 20)) * scale)
        found.append(shrinkage(known))
        assert shrinkage(known, 0.9) == max(found[-1], 0.9)
    assert 1 >= found[0] > found[1] > found[2] > 0
    assert found[2] < 0.01
