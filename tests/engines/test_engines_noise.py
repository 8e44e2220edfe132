"""The standard error of an output's relative error: whole samples are what is independent."""

import numpy as np
import pytest

from onnx_lowrank.engines.compare import Comparison
from onnx_lowrank.engines.noise import Noise


def drawn(seed, *shape):
    """An output of samples that differ in size, and errors that do, too."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 2, (shape[0], *[1] * (len(shape) - 1)))
    y = scale * rng.standard_normal(shape)
    return y, 0.1 * scale**2 * rng.standard_normal(shape)


def noise(*batches):
    made = Noise()
    for y, difference in batches:
        made.add(difference, y, batched=True)
    return made.error


def wanted(y, difference):
    """The definition, sample by sample."""
    a, b = ([float(np.sum(np.abs(row) ** 2)) for row in rows] for rows in (difference, y))
    ratio, n = sum(a) / sum(b), len(a)
    variance = n / (n - 1) * sum((p - ratio * q) ** 2 for p, q in zip(a, b, strict=True)) / sum(b) ** 2
    return np.sqrt(variance) / (2 * np.sqrt(ratio))


@pytest.mark.parametrize("shape", [(2, 3), (40,), (30, 7, 5)])
def test_it_is_that_of_the_ratio_estimator(shape):
    y, difference = drawn(0, *shape)
    assert noise((y, difference)) == pytest.approx(wanted(y, difference), rel=1e-12)
    rotated = y * np.exp(1j), difference * np.exp(2j)
    assert noise(rotated) == pytest.approx(wanted(y, difference), rel=1e-12)


def test_batches_do_not_change_it():
    y, difference = drawn(1, 30, 7)
    cut = [(y[:1], difference[:1]), (y[1:20], difference[1:20]), (y[20:], difference[20:])]
    assert noise(*cut) == pytest.approx(noise((y, difference)), rel=1e-12)


def test_what_a_sample_repeats_tells_nothing_new():
    """Tokens that repeat in every sample leave the noise as it was; twice the samples halve its square."""
    y, difference = drawn(2, 50, 6)
    once = noise((y, difference))
    assert noise((np.tile(y, (1, 9)), np.tile(difference, (1, 9)))) == pytest.approx(once, rel=1e-12)
    twice = noise((np.tile(y, (2, 1)), np.tile(difference, (2, 1))))
    assert twice == pytest.approx(once * np.sqrt(49 / 99), rel=1e-12)


def test_it_covers_the_spread_of_repeated_draws():
    errors, noises = [], []
    for seed in range(400):
        y, difference = drawn(seed, 200, 3)
        errors.append(np.linalg.norm(difference) / np.linalg.norm(y))
        noises.append(noise((y, difference)))
    assert np.median(noises) == pytest.approx(np.std(errors), rel=0.1)


@pytest.mark.parametrize(("shape", "scale", "expected"), [((1, 4), 1.0, None), ((5, 4), 0.0, None)])
def test_one_sample_and_an_output_of_zeros_have_none(shape, scale, expected):
    y, difference = drawn(3, *shape)
    assert noise((scale * y, difference)) is expected
    assert Noise().error is None


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_the_noise_of_huge_and_tiny_outputs_is_relative(scale):
    y, difference = drawn(3, 6, 4)
    assert noise((scale * y, scale * difference)) == pytest.approx(wanted(y, difference), rel=1e-9)


def test_squares_that_overflow_tell_no_noise():
    y, difference = drawn(3, 6, 4)
    assert noise((1e100 * y, 1e100 * difference)) is None


def test_no_error_has_no_noise():
    y, difference = drawn(4, 5, 4)
    assert noise((y, 0 * difference)) == 0


def test_a_comparison_counts_samples_and_leaves_out_what_is_not_finite():
    y, difference = drawn(5, 12, 6)
    y[3, 2] = np.nan
    clean, without = np.nan_to_num(y), np.where(np.isnan(y), 0, difference)
    comparison = Comparison()
    for start in range(0, 12, 4):
        rows = slice(start, start + 4)
        feed = {"x": np.zeros((4, 2))}
        comparison.add({"y": y[rows]}, {"y": y[rows] - difference[rows]}, feed)
    (error,) = comparison.errors()
    assert error.noise == pytest.approx(wanted(clean, without), rel=1e-9)
    whole = Comparison()
    whole.add({"y": y}, {"y": y - difference}, {"x": np.zeros((5, 2))})
    assert whole.errors()[0].noise is None
