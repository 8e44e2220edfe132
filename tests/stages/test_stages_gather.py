"""Moments around a layer of a walk against those of all rows at once."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.calibrate.moments import Accumulator
from onnx_lowrank.calibrate.prefix import Sight
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.operators.geometry import Vectors
from onnx_lowrank.stages.gather import Gatherer
from onnx_lowrank.work.executor import Threads

C, F, POSITIONS = 6, 4, 9


def sights(rng, number, shown):
    """Batches of 1 to 5 texts whose tokens are alike, with a mask or without."""
    for batch in range(number):
        size = 1 + batch % 5
        topic = rng.standard_normal((size, 1, C))
        x = (topic + 0.3 * rng.standard_normal((size, POSITIONS, C))).astype(np.float32)
        mask = rng.random(size * POSITIONS) < 0.7 if shown else None
        y = x @ rng.standard_normal((C, F)).astype(np.float32)
        yield Sight(None, x, y, None, batch % 6 == 5, mask, size)


def gatherer(threads, *, is_weighed=True):
    return Gatherer("w", Vectors(), (1, F, C), threads, is_weighed)


@pytest.mark.parametrize("shown", [False, True])
def test_samples_are_the_independent_blocks(shown):
    seen = list(sights(np.random.default_rng(0), 40, shown))
    with Threads(resolve("cpu"), number=2) as threads:
        share = gatherer(threads).shares(iter(seen))[False]
    rows, samples = [], []
    for sight in (sight for sight in seen if not sight.held):
        kept = slice(None) if sight.shown is None else sight.shown
        rows.append(sight.x_hat.reshape(-1, 1, C)[kept])
        samples.append(len(samples) * 100 + np.repeat(np.arange(sight.samples), POSITIONS)[kept])
    whole = Accumulator("w", 1, C)
    whole.add(np.concatenate(rows), np.concatenate(samples))
    whole.close_block()
    expected = whole.moments()
    assert share.inputs.count == expected.count
    np.testing.assert_allclose(share.inputs.second, expected.second, rtol=1e-5, atol=1e-5)
    # Four lanes estimate four variances, each from a quarter of the samples.
    assert share.inputs.independent == pytest.approx(expected.independent, rel=0.15)
    assert share.inputs.independent < 0.5 * expected.count


def test_a_batch_whose_samples_are_unknown_is_one_block():
    rng = np.random.default_rng(1)
    seen = [
        Sight(None, x, x @ np.ones((C, F), np.float32), None, n % 5 == 4)
        for n, x in enumerate(rng.standard_normal((40, 3, POSITIONS, C)).astype(np.float32))
    ]
    with Threads(resolve("cpu"), number=2) as threads:
        share = gatherer(threads).shares(iter(seen))[False]
    assert share.inputs.independent == pytest.approx(share.inputs.count, rel=0.5)


def test_moments_that_need_no_weighing_are_the_same():
    seen = list(sights(np.random.default_rng(0), 40, True))
    with Threads(resolve("cpu"), number=2) as threads:
        weighed, other = (gatherer(threads, is_weighed=each).shares(iter(seen)) for each in (True, False))
    for held in (False, True):
        assert other[held].inputs.independent is None
        np.testing.assert_array_equal(weighed[held].inputs.second, other[held].inputs.second)
        np.testing.assert_array_equal(weighed[held].targets.cross, other[held].targets.cross)
    assert weighed[False].inputs.independent is not None
    assert weighed[True].inputs.independent is None  # held-out inputs only judge
