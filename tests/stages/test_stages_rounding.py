"""Factors that are fitted to their quantization: exact where nothing is rounded, never worse where it is."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibrating import THREADS, made, measured, plan_of, run, seen
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg import rounding as linalg
from onnx_lowrank.quantize.int4 import Packed
from onnx_lowrank.quantize.int8 import Static
from onnx_lowrank.stages import quantizing
from onnx_lowrank.stages.build import assemble
from onnx_lowrank.stages.rounding import best, columns, pairs, rows, scale_of
from tiny import cnn

DATA = {"x": np.random.default_rng(3).standard_normal((50, 8, 6, 6)).astype(np.float32)}
OPTIONS = [Option(Fold.ENCODE, 1, 8), Option(Fold.COLS, 2, 9), None]


class Nothing(Static):
    """Rounds nothing."""

    def rounded(self, weight, operator):
        return weight


def fitted(built, method, calibration=None):
    """The low-rank model with the numbers that are fitted to a method, and how many weights that are."""
    found = seen(built.rewritten.model.proto)
    if calibration is None:
        fits = list(quantizing._alone(found, built.rewritten, method))
    else:
        fits = list(quantizing._walked(found, built.rewritten, method, calibration, THREADS))
    rewritten, _, files = assemble(found, fits, merging=False)
    with files:
        return rewritten.model.proto, len(fits)


@pytest.fixture
def calibrated():
    """A low-rank model with its calibration."""
    found = seen(cnn())
    with measured(found, DATA) as calibration:
        yield made(found, plan_of(found, OPTIONS), calibration), calibration


@pytest.mark.parametrize("with_data", [True, False])
def test_without_rounding_nothing_is_lost(calibrated, with_data):
    built, calibration = calibrated
    proto, count = fitted(built, Nothing(), calibration if with_data else None)
    assert count == (5 if with_data else 4)
    # The ranks have other scales, but the product is the same.
    stored = [
        {t.name: t.raw_data for t in each.graph.initializer} for each in (proto, built.rewritten.model.proto)
    ]
    assert stored[0]["conv1_encoder"] != stored[1]["conv1_encoder"]
    low = run(built.rewritten.model.proto, **DATA)
    np.testing.assert_allclose(run(proto, **DATA), low, rtol=0, atol=2e-5 * np.abs(low).max())


def test_a_fit_to_inputs_beats_rounding_alone(calibrated):
    built, calibration = calibrated

    class Coarse(Static):
        """Steps of a sixth of the largest number, which lose much."""

        def rounded(self, weight, operator):
            axes = tuple(range(2, weight.ndim))
            scale = np.abs(weight).max(axis=axes, keepdims=True) / 6
            return np.rint(weight / scale).astype(weight.dtype) * scale

    low = run(built.rewritten.model.proto, **DATA)
    proto, _ = fitted(built, Coarse(), calibration)
    found = seen(built.rewritten.model.proto)
    plain = [
        quantizing.Refitted(
            b, Coarse().rounded(quantizing.read(found.model, found.walk, b), ""), None, None, False
        )
        for b in found.bindings
    ]
    rounded = assemble(found, plain, merging=False)[0].model.proto
    losses = [np.linalg.norm(run(each, **DATA) - low) for each in (proto, rounded)]
    assert losses[0] < 0.9 * losses[1]


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), balanced=st.booleans())
def test_the_best_factors_lose_no_more_than_the_rounded_ones(seed, balanced):
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((1, 6, 40)), rng.standard_normal((1, 9, 6)) * 0.5 ** np.arange(6)
    rounds = (partial(Packed().rounded, operator="MatMul"),) * 2
    chosen = best(factors, rounds, balanced=balanced)
    wanted = factors
    if balanced:
        scales = scale_of(np.linalg.norm(factors[0][0], axis=1))
        wanted = rows(factors[0], scales), columns(factors[1], scales)
        assert linalg.error(factors, wanted) < 1e-20, "the scales of ranks change no product"
    plain = linalg.error(wanted, (rounds[0](wanted[0]), rounds[1](wanted[1])))
    assert linalg.error(wanted, chosen) <= plain * (1 + 1e-9)


def test_scales_are_the_square_roots_of_ranges():
    np.testing.assert_allclose(scale_of(np.array([4.0, 1.0, 0.0])), [1.0, 0.5, 1e-3**0.5])
    np.testing.assert_allclose(scale_of(np.zeros(2)), 1.0)


def test_the_chains_whose_ranks_may_get_scales():
    found = seen(cnn())
    built = made(found, plan_of(found, OPTIONS, Fit.WEIGHTS), None)
    low = seen(built.rewritten.model.proto)
    names = [(e.layer.id, d.layer.id) for e, d in pairs(low, built.rewritten)]
    assert names == [("conv1_encoder", "conv1_decoder"), ("conv2_encoder", "conv2_decoder")]
    # Not if something else reads the ranks.
    proto = built.rewritten.model.proto
    proto.graph.node.add(op_type="Relu", input=[proto.graph.node[0].output[0]], output=["beside"])
    names = [e.layer.id for e, _ in pairs(seen(proto), built.rewritten)]
    assert names == ["conv2_encoder"]
