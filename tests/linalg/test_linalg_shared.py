"""A shared encoder: least sum of relative errors, errors of all ranks, and decoders by least squares."""

from __future__ import annotations

import numpy as np
import pytest
import scipy

from onnx_lowrank.core.factors import Moments
from onnx_lowrank.linalg import shared
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import error

CPU = resolve("cpu")
RIDGE = 0.1


def drawn(shapes, seed=0, scales=(1.0, 30.0, 0.02)):
    """Weights of very different sizes, and moments of correlated inputs."""
    rng = np.random.default_rng(seed)
    weights = [s * rng.standard_normal(shape) for s, shape in zip(scales, shapes, strict=False)]
    p = int(np.prod(shapes[0][2:]))
    x = rng.standard_normal((500, p)) @ rng.standard_normal((p, p)) + rng.standard_normal(p)
    mean = x.mean(axis=0)
    return weights, Moments(500, mean[None], ((x - mean).T @ (x - mean) / 500)[None])


SHAPES = {
    "matrices": [(1, 7, 12), (1, 5, 12), (1, 9, 12)],
    "kernels": [(1, 4, 3, 2, 2), (1, 6, 3, 2, 2)],
    "more inputs than outputs": [(1, 2, 12), (1, 3, 12)],
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("centred", [True, False])
def test_no_encoder_has_a_smaller_sum_of_errors(shapes, centred):
    weights, moments = drawn(shapes)
    flags = [centred] * len(weights)
    members = shared.problems(weights, moments, flags, RIDGE)
    stack = shared.stacked(weights, moments, flags, RIDGE)
    top = min(12, sum(shape[1] for shape in shapes))
    curves = shared.errors(stack, members, shapes, top, CPU)
    # By Eckart and Young: the tail of the spectrum of the whitened stack, each part of norm 1.
    root = scipy.linalg.sqrtm(members[0].second[0]).real
    parts = [weight.reshape(shape[1], -1) @ root for weight, shape in zip(weights, shapes, strict=True)]
    whitened = np.concatenate([part / np.linalg.norm(part) for part in parts])
    squares = scipy.linalg.svdvals(whitened) ** 2
    tails = [squares[j:].sum() for j in range(top + 1)]
    np.testing.assert_allclose(np.sum(curves, axis=0), tails, atol=1e-9)


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("flags", [(True, False, True), (False, False, False), (True, True, True)])
def test_every_rank_has_the_error_of_its_factors(shapes, flags):
    weights, moments = drawn(shapes, seed=1)
    flags = flags[: len(weights)]
    members = shared.problems(weights, moments, flags, RIDGE)
    stack = shared.stacked(weights, moments, flags, RIDGE)
    top = min(12, sum(shape[1] for shape in shapes))
    curves = shared.errors(stack, members, shapes, top, CPU)
    for curve in curves:
        assert curve[0] == 1
        assert (np.diff(curve) <= 0).all()
    for j in (1, 3, top):
        encoder = shared.encoder(stack, shapes[0], j, CPU)
        for member, shape, curve in zip(members, shapes, curves, strict=True):
            factors = shared.fit(member, shape, encoder, CPU)
            np.testing.assert_array_equal(factors.encoder, encoder)
            assert factors.decoder.shape == (1, shape[1], 1, j, *[1] * len(shape[3:]))
            assert error(member, compose(factors)) == pytest.approx(curve[j], abs=1e-9)
    np.testing.assert_allclose(np.array(curves)[:, top], 0, atol=1e-9)


def test_a_decoder_makes_up_for_a_rounded_encoder():
    weights, moments = drawn(SHAPES["matrices"], seed=2)
    members = shared.problems(weights, moments, [False] * 3, RIDGE)
    stack = shared.stacked(weights, moments, [False] * 3, RIDGE)
    encoder = shared.encoder(stack, (1, 7, 12), 6, CPU)
    rounded = encoder.astype(np.float16)
    for member, weight in zip(members, weights, strict=True):
        fitted = error(member, compose(shared.fit(member, weight.shape, rounded, CPU)))
        exact = shared.fit(member, weight.shape, encoder, CPU)
        unfitted = type(exact)(exact.fold, rounded.astype(np.float64), exact.decoder)
        assert fitted <= error(member, compose(unfitted)) + 1e-12


def test_a_layer_without_outputs_takes_no_part():
    weights, moments = drawn(SHAPES["matrices"], seed=3)
    weights[1] = np.zeros_like(weights[1])
    members = shared.problems(weights, moments, [False] * 3, RIDGE)
    stack = shared.stacked(weights, moments, [False] * 3, RIDGE)
    curves = shared.errors(stack, members, SHAPES["matrices"], 10, CPU)
    assert (curves[1] == 0).all()
    encoder = shared.encoder(stack, (1, 7, 12), 4, CPU)
    assert np.isfinite(encoder).all()
    assert not shared.fit(members[1], weights[1].shape, encoder, CPU).decoder.any()


def test_the_encoder_has_the_size_of_the_weights():
    for scale in (1e-6, 1.0, 1e6):
        weights, moments = drawn(SHAPES["matrices"], scales=(scale, scale, scale))
        stack = shared.stacked(weights, moments, [False] * 3, RIDGE)
        encoder = shared.encoder(stack, (1, 7, 12), 5, CPU)
        assert 0.1 < np.sqrt(np.mean(encoder**2)) / np.sqrt(scale) < 10


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("centred", [True, False])
def test_likeness_is_that_of_the_outputs(shapes, centred):
    """Linear CKA of outputs that are drawn so that their moments are exact."""
    weights, moments = drawn(shapes, seed=4)
    members = shared.problems(weights, moments, [centred] * len(weights), RIDGE)
    root = scipy.linalg.sqrtm(members[0].second[0]).real  # Its rows are samples with these moments.
    outputs = [root @ weight.reshape(shape[1], -1).T for weight, shape in zip(weights, shapes, strict=True)]
    grams = [each @ each.T for each in outputs]
    wanted = [[np.sum(a * b) / (np.linalg.norm(a) * np.linalg.norm(b)) for b in grams] for a in grams]
    np.testing.assert_allclose(shared.likeness(members), wanted, rtol=1e-9)


def test_rotated_outputs_are_alike_and_those_without_power_are_like_no_others():
    rng = np.random.default_rng(5)
    (one, _, _), moments = drawn([(1, 6, 12), (1, 6, 12), (1, 6, 12)])
    turned = 3 * np.einsum("ij,gjc->gic", scipy.linalg.qr(rng.standard_normal((6, 6)))[0], one)
    members = shared.problems([one, turned, np.zeros_like(one)], moments, [False] * 3, RIDGE)
    wanted = [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    np.testing.assert_allclose(shared.likeness(members), wanted, atol=1e-12)
