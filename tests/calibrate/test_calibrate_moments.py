"""Streamed moments against those of all rows at once, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.calibrate import moments as module
from onnx_lowrank.calibrate.moments import Accumulator, merged, merged_pairs
from onnx_lowrank.errors import InputError


def reference(rows):
    """Mean and centred second moments of rows (number, g, n), in float64."""
    rows = rows.astype(np.float64)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return mean, np.einsum("rgi,rgj->gij", centred, centred) / len(rows)


def streamed(rows, cuts=()):
    accumulator = Accumulator("layer 'w'", *rows.shape[1:])
    for part in np.split(rows, list(cuts)):
        accumulator.add(part)
    return accumulator.moments()


def correlated(seed, count, groups, size, dtype, offset=0.0):
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((groups, size, size))
    rows = np.einsum("rgi,gij->rgj", rng.standard_normal((count, groups, size)), mixing) + offset
    return rows.astype(dtype)


def assert_close(found, rows, tolerance):
    """Moments within a tolerance, relative to the standard deviations of the two features."""
    mean, second = reference(rows)
    deviation = np.sqrt(np.einsum("gii->gi", second))
    assert found.count == len(rows)
    assert np.all(np.abs(found.mean - mean) <= tolerance * deviation)
    assert np.all(np.abs(found.second - second) <= tolerance * deviation[:, :, None] * deviation[:, None, :])


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("size", [1, 5, 40])
@pytest.mark.parametrize("cuts", [(), (1,), (7, 8, 200), tuple(range(1, 500))], ids=len)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("float64", 1e-13)])
def test_moments_do_not_depend_on_the_cuts(groups, size, cuts, dtype, tolerance):
    rows = correlated(size, 500, groups, size, dtype)
    assert_close(streamed(rows, cuts), rows, tolerance)


@pytest.mark.parametrize("offset", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_large_mean_costs_no_digits(offset, dtype):
    rows = correlated(1, 5000, 1, 12, dtype, offset)
    assert_close(streamed(rows, range(100, 5000, 100)), rows, 1e-5)


@pytest.mark.parametrize("first", [0.0, 1000.0])
def test_a_first_chunk_unlike_the_others(first):
    rows = correlated(2, 4000, 1, 6, "float32")
    rows[:50] = first
    assert_close(streamed(rows, range(50, 4000, 50)), rows, 1e-5)


@pytest.mark.parametrize("order", ["C", "F", "K"])
def test_layouts(order):
    rows = correlated(3, 300, 2, 9, "float32")
    laid_out = rows.transpose(1, 2, 0).copy().transpose(2, 0, 1) if order == "K" else rows.copy(order)
    assert_close(streamed(laid_out, (100, 101)), rows, 2e-6)


def test_second_moments_are_symmetric():
    second = streamed(correlated(4, 777, 2, 30, "float32"), (5, 300)).second
    np.testing.assert_array_equal(second, second.swapaxes(1, 2))


def test_rows_are_not_changed_and_not_kept():
    rows = correlated(5, 20, 1, 40, "float32")
    copy = rows.copy()
    accumulator = Accumulator("layer 'w'", 1, 40)
    accumulator.add(rows)
    np.testing.assert_array_equal(rows, copy)
    rows[:] = 0  # as if the runtime used its memory again
    assert_close(accumulator.moments(), copy, 2e-6)


def test_moments_can_be_asked_for_on_the_way():
    rows = correlated(6, 300, 1, 8, "float64")
    accumulator = Accumulator("layer 'w'", 1, 8)
    accumulator.add(rows[:100])
    first = accumulator.moments()
    accumulator.add(rows[100:])
    assert_close(first, rows[:100], 1e-13)
    assert_close(accumulator.moments(), rows, 1e-13)


def test_what_waits_is_bounded(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 4000)
    accumulator = Accumulator("layer 'w'", 1, 50)
    for _ in range(100):
        accumulator.add(np.ones((1, 1, 50), np.float32))
        assert sum(rows.nbytes for rows in accumulator._waiting) <= 4000
    assert accumulator.moments().count == 100


def test_no_rows():
    accumulator = Accumulator("layer 'w'", 2, 3)
    assert accumulator.moments() is None
    accumulator.add(np.empty((0, 2, 3), np.float32))
    assert accumulator.moments() is None


def test_one_row():
    found = streamed(correlated(7, 1, 2, 3, "float64"))
    assert found.count == 1
    np.testing.assert_array_equal(found.second, np.zeros((2, 3, 3)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("row", [0, 499])
def test_what_is_not_finite_names_the_layer(value, row):
    rows = correlated(8, 500, 2, 4, "float32")
    rows[row, 1, 2] = value
    with pytest.raises(InputError, match="activations of layer 'w' hold NaN"):
        streamed(rows, (100, 400))


def paired(x, y, cuts=()):
    """The moments of vectors and targets, as they come in the parts between the cuts."""
    accumulator = Accumulator("layer 'w'", *x.shape[1:], y.shape[2])
    for part in np.split(np.concatenate([x, y], axis=2), list(cuts)):
        accumulator.add(part)
    return accumulator.pair()


def with_targets(groups):
    """Vectors, and targets that depend on them."""
    rng = np.random.default_rng(10)
    x = correlated(11, 400, groups, 7, "float64", offset=2.0)
    weight = rng.standard_normal((groups, 3, 7))
    return x, np.einsum("gfp,rgp->rgf", weight, x) + rng.standard_normal((400, groups, 3)) + 5.0


def assert_pair(pair, x, y, rtol):
    """Whether the moments are those of a direct computation."""
    inputs, targets = pair
    assert_close(inputs, x, rtol)
    centred = y - y.mean(axis=0)
    cross = np.einsum("rgf,rgp->gfp", centred, x - x.mean(axis=0)) / len(x)
    np.testing.assert_allclose(targets.mean, y.mean(axis=0), rtol=rtol)
    np.testing.assert_allclose(targets.cross, cross, rtol=10 * rtol, atol=10 * rtol)
    np.testing.assert_allclose(targets.power, np.mean((centred**2).sum(axis=2), axis=0), rtol=rtol)


@pytest.mark.parametrize("cuts", [(), (1,), (3, 20, 390)])
@pytest.mark.parametrize("groups", [1, 2])
def test_targets_beside_vectors(groups, cuts):
    x, y = with_targets(groups)
    assert_pair(paired(x, y, cuts), x, y, 1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e200])
def test_a_target_that_is_not_finite_names_the_layer(value):
    x, y = with_targets(2)
    y[7, 1, 2] = value
    with pytest.raises(InputError, match="activations of layer 'w' hold NaN"):
        paired(x, y)


def test_no_vectors_have_no_pair():
    assert Accumulator("w", 1, 2, 3).pair() is None


@pytest.mark.parametrize("parts", [(400,), (1, 399), (10, 90, 250, 50)])
def test_merged_pairs_are_the_whole(parts):
    x, y = with_targets(2)
    cuts = np.cumsum(parts)[:-1]
    pairs = [paired(*part) for part in zip(np.split(x, cuts), np.split(y, cuts), strict=True)]
    assert_pair(merged_pairs(pairs), x, y, 1e-11)


@pytest.mark.parametrize("parts", [(5,), (5, 40), (1, 2, 3, 60)])
def test_merged_parts_are_the_whole(parts):
    rows = np.random.default_rng(sum(parts)).standard_normal((sum(parts), 2, 6)) * [1, 2, 3, 4, 5, 6] + 7

    def of(some):
        accumulator = Accumulator("x", 2, 6)
        accumulator.add(some)
        return accumulator.moments()

    whole = merged([of(part) for part in np.split(rows, np.cumsum(parts)[:-1])])
    assert whole.count == sum(parts)
    np.testing.assert_allclose(whole.mean, rows.mean(axis=0), rtol=1e-12)
    for group in range(2):
        expected = np.cov(rows[:, group].T, bias=True)
        np.testing.assert_allclose(whole.second[group], expected, rtol=1e-10, atol=1e-10)
