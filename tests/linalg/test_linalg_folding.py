"""Folds, slices and the layout of factors."""

import numpy as np
import pytest
from linalg_reference import CASES, naive_fold

from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg.folding import compose, fold, split, unfold

E, R, C, D = Fold.ENCODE, Fold.ROWS, Fold.COLS, Fold.DECODE


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ((), (E,)),
        ((1,), (E,)),
        ((3,), (E, D)),
        ((1, 1), (E,)),
        ((5, 1), (E, R)),
        ((1, 5), (E, C)),
        ((3, 3), (E, R, C, D)),
        ((2, 3), (E, R, C, D)),
        ((1, 1, 1), (E,)),
        ((1, 3, 3), (E, D)),
        ((3, 3, 3), (E, D)),
    ],
)
def test_distinct_folds(kernel, expected):
    assert Fold.distinct(kernel) == expected


@pytest.mark.parametrize(("shape", "how", "k"), CASES)
def test_folds_that_are_left_out_coincide_with_an_earlier_one(shape, how, k):
    weight = np.arange(1.0, 1.0 + np.prod(shape)).reshape(shape)
    sigma = np.linalg.svd(naive_fold(weight, how, k), compute_uv=False)
    others = [
        np.linalg.svd(naive_fold(weight, other, k), compute_uv=False) for other in Fold.distinct(shape[3:])
    ]
    assert any(other.shape == sigma.shape and np.allclose(other, sigma, rtol=1e-12) for other in others)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "how", "k"), CASES)
def test_fold_is_its_definition_and_unfold_its_inverse(shape, how, k, dtype):
    weight = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    before = weight.copy()
    matrices = fold(weight, how, k)
    assert matrices.dtype == dtype
    np.testing.assert_array_equal(matrices, naive_fold(weight, how, k))
    np.testing.assert_array_equal(unfold(matrices, how, shape), weight)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize(("shape", "how", "k"), CASES)
def test_split_lays_factors_out_and_compose_multiplies_them(shape, how, k):
    rng = np.random.default_rng(2)
    g, _, rows, cols = fold(np.zeros(shape), how, k).shape
    j = 3
    left, right = rng.standard_normal((g, k, rows, j)), rng.standard_normal((g, k, j, cols))
    factors = split(left, right, how, shape)
    encoder_kernel, decoder_kernel = how.kernels(shape[3:])
    assert factors.fold is how
    assert factors.encoder.shape == (g, k, j, shape[2] // k, *encoder_kernel)
    assert factors.decoder.shape == (g, shape[1], k, j, *decoder_kernel)
    assert factors.size == left.size + right.size
    composed = compose(factors)
    assert composed.shape == shape
    np.testing.assert_allclose(naive_fold(composed, how, k), left @ right, rtol=1e-13, atol=1e-13)


def test_slices_are_cut_from_the_input_channels_before_folding():
    weight = np.arange(2 * 4 * 3 * 3.0).reshape(1, 2, 4, 3, 3)
    for how in Fold:
        for i in range(2):
            expected = set(weight[0, :, 2 * i : 2 * i + 2].ravel())
            assert set(fold(weight, how, 2)[0, i].ravel()) == expected


def test_a_chain_of_two_convolutions_computes_the_composed_weight():
    # y[o, p, q] = sum_{c, a, b} W[o, c, a, b] x[c, p + a, q + b], by the two operators one after the other.
    rng = np.random.default_rng(3)
    shape, k, j = (1, 3, 4, 2, 3), 2, 2
    x = rng.standard_normal((4, 5, 6))

    def convolve(weight, x):
        f, _, a, b = weight.shape
        height, width = x.shape[1] - a + 1, x.shape[2] - b + 1
        return np.array(
            [[[np.sum(weight[o] * x[:, p : p + a, q : q + b]) for q in range(width)] for p in range(height)]
             for o in range(f)]
        )  # fmt: skip

    for how in Fold:
        _, _, rows, cols = fold(np.zeros(shape), how, k).shape
        factors = split(
            rng.standard_normal((1, k, rows, j)), rng.standard_normal((1, k, j, cols)), how, shape
        )
        hidden = np.concatenate([convolve(factors.encoder[0, i], x[2 * i : 2 * i + 2]) for i in range(k)])
        decoder = factors.decoder.reshape(3, k * j, *factors.decoder.shape[4:])
        np.testing.assert_allclose(convolve(decoder, hidden), convolve(compose(factors)[0], x), atol=1e-12)
