"""Errors at hidden positions count in no comparison."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.engines.compare import compare
from onnx_lowrank.engines.padding import NO_PADDING, Padding

MASK = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
FEED = {"mask": MASK, "ids": MASK}
RNG = np.random.default_rng(0)


def test_hidden_positions_are_not_numbers():
    values = RNG.standard_normal((3, 4, 5))
    hidden = Padding("mask", {"y": 1}).hide("y", values, FEED)
    np.testing.assert_array_equal(np.isnan(hidden).all(axis=2), MASK == 0)
    np.testing.assert_array_equal(hidden[MASK > 0], values[MASK > 0])
    assert np.isfinite(values).all()


@pytest.mark.parametrize(
    ("padding", "shape"),
    [
        (NO_PADDING, (3, 4, 5)),
        (Padding("mask", {"other": 1}), (3, 4, 5)),
        (Padding("mask", {"y": 1}), (3, 5, 4)),
        (Padding("absent", {"y": 1}), (3, 4, 5)),
        (Padding("mask", {"y": 2}), (3, 4)),
        (Padding("mask", {"y": 1}), ()),
    ],
)
def test_outputs_without_positions_stay(padding, shape):
    values = RNG.standard_normal(shape)
    assert padding.hide("y", values, FEED) is values


def test_a_mask_that_shows_all_hides_nothing():
    assert Padding("mask").shown({"mask": np.ones((2, 3))}) is None
    np.testing.assert_array_equal(Padding("mask").shown(FEED), MASK > 0)


def test_errors_are_those_of_shown_positions():
    y = RNG.standard_normal((3, 4, 5))
    z = y + 0.1 * RNG.standard_normal(y.shape)
    z[MASK == 0] = 100.0
    (error,) = compare({"y": y}, {"y": z}, FEED, Padding("mask", {"y": 1}))
    shown = MASK > 0
    lost = np.linalg.norm(y[shown] - z[shown])
    assert error.relative == pytest.approx(lost / np.linalg.norm(y[shown]))
    assert error.agreement == pytest.approx(np.mean(y[shown].argmax(-1) == z[shown].argmax(-1)))
    assert error.note == ""
    # The mean of a position is that of the samples that show it.
    about = np.where(shown[:, :, None], y, np.nan)
    power = np.nansum((about - np.nanmean(about, axis=0)) ** 2)
    assert error.centred == pytest.approx(lost / np.sqrt(power))


def test_integers_at_hidden_positions_agree():
    y = RNG.integers(0, 9, (3, 4))
    z = np.where(MASK > 0, y, -1)
    z[0, 0] += 1
    (error,) = compare({"y": y}, {"y": z}, FEED, Padding("mask", {"y": 1}))
    assert error.agreement == pytest.approx(7 / 8)


def test_nan_of_the_input_model_is_still_told():
    y = RNG.standard_normal((3, 4, 5))
    y[0, 0, 0] = np.nan
    (error,) = compare({"y": y}, {"y": y}, FEED, Padding("mask", {"y": 1}))
    assert error.note.startswith("1 of 40 elements are NaN")
