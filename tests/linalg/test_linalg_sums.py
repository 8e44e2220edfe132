"""A shared decoder: the least error of the sum, split among the layers, and encoders by least squares."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.core.factors import Moments
from onnx_lowrank.linalg import sums
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import error, of_weight

CPU = resolve("cpu")
SHAPES = {
    "matrices": [(1, 8, 12), (1, 8, 5)],
    "kernels": [(1, 6, 3, 2, 2), (1, 6, 4, 1, 1), (1, 6, 2, 2, 2)],
    "more outputs than inputs": [(1, 20, 4), (1, 20, 5)],
}


def moments(rows):
    mean = rows.mean(axis=0)
    return Moments(len(rows), mean[None], ((rows - mean).T @ (rows - mean) / len(rows))[None])


def drawn(shapes, seed=0, independent=False):
    """Weights, inputs that depend on each other, and the sum of the results."""
    rng = np.random.default_rng(seed)
    sizes = [int(np.prod(shape[2:])) for shape in shapes]
    rows = rng.standard_normal((500, sum(sizes)))
    if independent:  # also in these samples
        rows = np.linalg.qr(rows - rows.mean(axis=0))[0] * 500**0.5
    else:
        rows = rows @ rng.standard_normal((sum(sizes), sum(sizes))) + rng.standard_normal(sum(sizes))
    inputs = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
    weights = [s * rng.standard_normal(shape) for s, shape in zip((1.0, 4.0, 0.3), shapes, strict=False)]
    maps = [weight.reshape(shape[1], -1) for weight, shape in zip(weights, shapes, strict=True)]
    return weights, inputs, sum(x @ m.T for x, m in zip(inputs, maps, strict=True))


def power(rows, centred):
    rows = rows - rows.mean(axis=0) if centred else rows
    return float(np.sum(rows**2) / len(rows))


def outputs_of(weights, inputs, outputs, centred, ridge=1e-12):
    read = [moments(x) for x in inputs]
    return sums.outputs_of(weights, moments(outputs), read, centred=centred, ridge=[ridge] * len(weights))


def members_of(weights, inputs, centred, ridge=1e-12):
    pairs = zip(weights, inputs, strict=True)
    return [of_weight(weight, moments(x), centred=centred, ridge=ridge) for weight, x in pairs]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("centred", [True, False])
def test_the_error_of_the_sum_is_least_and_split_among_the_layers(shapes, centred):
    weights, inputs, outputs = drawn(shapes)
    top = min(shapes[0][1], sum(x.shape[1] for x in inputs))
    given, members = outputs_of(weights, inputs, outputs, centred), members_of(weights, inputs, centred)
    found = sums.errors(given, top, CPU)
    lost = sum(m.power[0] * curve for m, curve in zip(members, found, strict=True))
    # By Eckart and Young: the tail of the squared singular values of the outputs.
    shown = outputs - outputs.mean(axis=0) if centred else outputs
    squares = np.linalg.svd(shown, compute_uv=False) ** 2 / len(shown)
    tails = [squares[j:].sum() for j in range(top + 1)]
    np.testing.assert_allclose(lost, tails, atol=1e-9 * tails[0])
    assert all((curve >= 0).all() and curve.shape == (top + 1,) for curve in found)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("centred", [True, False])
def test_every_rank_has_the_error_of_its_factors(shapes, centred):
    weights, inputs, outputs = drawn(shapes, seed=1)
    top = min(shapes[0][1], sum(x.shape[1] for x in inputs))
    given, members = outputs_of(weights, inputs, outputs, centred), members_of(weights, inputs, centred)
    found = sums.errors(given, top, CPU)
    for j in (1, 3, top):
        factors = sums.fit(given, weights, j, CPU)
        assert all(np.array_equal(each.decoder, factors[0].decoder) for each in factors)
        assert [each.encoder.shape[2] for each in factors] == [j] * len(weights)
        products = [compose(each).reshape(each.decoder.shape[1], -1) for each in factors]
        lost = power(outputs - sum(x @ p.T for x, p in zip(inputs, products, strict=True)), centred)
        told = sum(m.power[0] * curve[j] for m, curve in zip(members, found, strict=True))
        assert told == pytest.approx(lost, rel=1e-6, abs=1e-9 * power(outputs, centred))


def test_layers_with_independent_outputs_have_their_own_errors():
    weights, inputs, outputs = drawn(SHAPES["matrices"], independent=True)
    given, members = outputs_of(weights, inputs, outputs, True), members_of(weights, inputs, True)
    found = sums.errors(given, 8, CPU)
    for j in range(1, 8):
        factors = sums.fit(given, weights, j, CPU)
        for member, curve, made in zip(members, found, factors, strict=True):
            assert curve[j] == pytest.approx(error(member, compose(made)), rel=1e-9)


def test_the_ridge_is_that_of_the_layers():
    """Layers with independent outputs err as they do apart, with the ridge of each."""
    weights, inputs, outputs = drawn(SHAPES["matrices"], independent=True)
    given, members = outputs_of(weights, inputs, outputs, True, 0.3), members_of(weights, inputs, True, 0.3)
    found = sums.errors(given, 8, CPU)
    for j in (1, 4, 7):
        factors = sums.fit(given, weights, j, CPU)
        for member, curve, made in zip(members, found, factors, strict=True):
            assert curve[j] == pytest.approx(error(member, compose(made)), rel=1e-9)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_no_encoder_is_better_for_a_decoder(shapes):
    weights, inputs, outputs = drawn(shapes, seed=2)
    (first, *_) = sums.fit(outputs_of(weights, inputs, outputs, True), weights, 3, CPU)
    member, *_ = members_of(weights, inputs, True, 0.1)
    made = sums.encoded(member, shapes[0], first.decoder, CPU)
    np.testing.assert_array_equal(made.decoder, first.decoder)
    least = error(member, compose(made))
    rng = np.random.default_rng(4)
    for size in (1e-3, 1e-1):
        for _ in range(5):
            moved = type(made)(
                made.fold, made.encoder + size * rng.standard_normal(made.encoder.shape), made.decoder
            )
            assert error(member, compose(moved)) > least


def test_layers_without_outputs_have_no_error():
    weights = [np.zeros((1, 4, 3)), np.zeros((1, 4, 2))]
    inputs = [np.ones((10, 3)), np.ones((10, 2))]
    given = outputs_of(weights, inputs, np.zeros((10, 4)), False)
    assert not np.any(sums.errors(given, 4, CPU))
