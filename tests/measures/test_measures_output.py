"""Curves through measured points: exact where they are known, and rising everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from onnx_lowrank.measures.output import predicted

Points = Sequence[tuple[float, float]]
POWER = [(0.01, 0.02), (0.04, 0.16), (0.3, 9.0)]
"""Slope 1.5 between the first two, and 2 between the last two."""


def at(points: Points, *errors: float) -> np.ndarray:
    return predicted(np.array(errors), points)


def drawn(seed: int) -> list[tuple[float, float]]:
    """Points in any order, some with the same own error, some with no output error."""
    rng = np.random.default_rng(seed)
    number = int(rng.integers(1, 8))
    own = 10.0 ** rng.uniform(-4, 0, number)
    own[rng.random(number) < 0.2] = own[0]
    caused = own ** rng.uniform(0.3, 2) * 10.0 ** rng.normal(0, 0.5, number)
    caused[rng.random(number) < 0.2] = 0.0
    return list(zip(own.tolist(), caused.tolist(), strict=True))


@pytest.mark.parametrize("seed", range(100))
def test_it_goes_through_points_that_rise(seed):
    rng = np.random.default_rng(seed)
    own, caused = (np.cumprod(rng.uniform(1.1, 5, 5)) * 1e-4 for _ in range(2))
    order = rng.permutation(5)
    points = list(zip(own[order].tolist(), caused[order].tolist(), strict=True))
    np.testing.assert_allclose(predicted(own, points), caused, rtol=1e-12)


@pytest.mark.parametrize("seed", range(100))
def test_between_points_it_is_a_power_law(seed):
    rng = np.random.default_rng(seed)
    scale, slope = rng.uniform(0.1, 10), rng.uniform(0.5, 3)
    own = np.sort(10.0 ** rng.uniform(-3, 0, 4))
    points = list(zip(own.tolist(), (scale * own**slope).tolist(), strict=True))
    inside, above = np.geomspace(own[0], own[-1], 50), np.geomspace(own[-1], 10 * own[-1], 20)
    np.testing.assert_allclose(predicted(inside, points), scale * inside**slope, rtol=1e-10)
    np.testing.assert_allclose(predicted(above, points), scale * above**slope, rtol=1e-10)


@pytest.mark.parametrize("seed", range(100))
def test_below_the_points_it_is_proportional(seed):
    points = drawn(seed)
    first = min(own for own, _ in points)
    share = np.geomspace(1e-9, 1, 30)
    at_first = at(points, first)
    np.testing.assert_allclose(predicted(first * share, points), at_first * share, rtol=1e-10)


@pytest.mark.parametrize("seed", range(300))
def test_it_rises_strictly(seed):
    rng = np.random.default_rng(seed)
    points = drawn(seed)
    errors = np.concatenate([10.0 ** rng.uniform(-8, 1, 500), [own for own, _ in points]])
    # As far apart as errors are after they are rounded to 9 digits.
    errors = np.unique(np.concatenate([[0.0], errors, errors * (1 + 1e-8)]))
    errors = errors[np.insert(np.diff(errors) > 1e-9 * errors[1:], 0, True)]
    values = predicted(errors, points)
    assert values[0] == 0
    assert np.isfinite(values).all()
    assert (np.diff(values) > 0).all()


@pytest.mark.parametrize("seed", range(100))
def test_neighbouring_numbers_do_not_change_places(seed):
    points = drawn(seed)
    own = np.array([own for own, _ in points])
    steps = [own]
    for _ in range(20):
        steps = [np.nextafter(steps[0], 0), *steps, np.nextafter(steps[-1], 2)]
    values = predicted(np.unique(steps), points)
    assert (np.diff(values) >= -1e-15 * values[1:]).all()
    assert values[-1] > 0


@pytest.mark.parametrize("seed", range(100))
def test_the_order_of_points_and_repeated_ones_make_no_difference(seed):
    points = drawn(seed)
    errors = np.geomspace(1e-6, 2, 100)
    rng = np.random.default_rng(seed)
    mixed = [points[n] for n in rng.permutation(len(points))]
    assert np.array_equal(predicted(errors, points), predicted(errors, mixed + mixed))


@pytest.mark.parametrize(
    ("points", "error", "wanted"),
    [
        ([(0.1, 0.4)], 0.025, 0.1),
        ([(0.1, 0.4)], 0.2, 0.8),
        ([(0.1, 0.4)], 0.1, 0.4),
        (POWER, 0.02, 0.02 * 2**1.5),
        (POWER, 0.005, 0.01),
        (POWER, 0.6, 36.0),
        ([(0.1, 0.3), (0.1, 0.5)], 0.1, 0.5),
        ([(0.1, 0.5), (0.1, 0.3)], 0.1, 0.5),
        ([(0.1, 0.3), (0.1, 0.5), (0.4, 1.0)], 0.2, 0.5 * 2**0.5),
        ([(0.1, 0.5), (0.4, 0.6)], 1.6, 0.6 * 2),
        ([(0.1, 1e-9), (0.2, 1.0)], 0.4, 2.0**8),
    ],
)
def test_values_by_hand(points, error, wanted):
    np.testing.assert_allclose(at(points, error), [wanted], rtol=1e-12)


def test_points_are_raised_to_those_before_them():
    points = [(0.01, 0.1), (0.1, 0.04), (0.5, 0.3)]
    values = at(points, 0.01, 0.1, 0.5)
    np.testing.assert_allclose(values, [0.1, 0.1, 0.3], rtol=3e-3)
    assert values[1] > values[0]


def test_outputs_that_do_not_change_keep_the_order_of_options():
    values = at([(0.01, 0.0), (0.1, 0.0)], 0.001, 0.01, 0.05, 0.1, 0.2)
    assert (np.diff(values) > 0).all()
    assert values[0] > 0
    assert values[-1] < 1e-11
    np.testing.assert_allclose(at([(0.01, 0.0), (0.1, 5.0)], 0.01, 0.1), [5e-12, 5.0], rtol=1e-12)


def test_without_points_the_layers_own_errors_stand():
    errors = np.array([[0.0, 0.5], [1.0, 0.25]])
    values = predicted(errors, [])
    assert np.array_equal(values, errors)
    assert values is not errors


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (4, 0, 2)])
def test_it_keeps_the_shape_and_its_input(shape):
    errors = np.full(shape, 0.2)
    before = errors.copy()
    values = predicted(errors, POWER)
    assert values.shape == shape
    assert values.dtype == np.float64
    np.testing.assert_allclose(values, np.full(shape, 4.0), rtol=1e-12)
    assert np.array_equal(errors, before)


def test_nothing_lost_is_nothing_lost():
    assert np.array_equal(at(POWER, 0.0, 0.0), [0.0, 0.0])
