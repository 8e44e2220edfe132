"""Factors against Eckart–Young, and certificates against extended precision."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from linalg_reference import CASES, SHAPES, folds_of, matrix_shape, naive_fold, planted, tail

from devices import fake
from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.errors import PlanError
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.certificate import certify, certify_product
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.linalg.folding import compose

CPU = resolve("cpu")
STRICT = fake()
ROUNDOFF = {np.float16: 2.0**-11, ml_dtypes.bfloat16: 2.0**-8, np.float32: 2.0**-24, np.float64: 2.0**-53}


def stored(factors, dtype):
    return Factors(factors.fold, factors.encoder.astype(dtype), factors.decoder.astype(dtype))


def frobenius(array):
    return float(np.sqrt(np.sum(array.astype(np.float64) ** 2)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES)
def test_every_rank_has_the_error_of_eckart_young(shape, fold, k, dtype):
    weight = np.random.default_rng(12).standard_normal(shape).astype(dtype)
    before = weight.copy()
    sigma = np.linalg.svd(naive_fold(weight, fold, k), compute_uv=False)
    for j in range(1, sigma.shape[-1] + 1):
        factors = factorize(weight, Option(fold, k, j), CPU)
        assert factors.encoder.dtype == factors.decoder.dtype == np.float64
        assert factors.encoder.shape[1:3] == factors.decoder.shape[2:4] == (k, j)
        error = frobenius(weight - compose(factors))
        assert error == pytest.approx(tail(sigma, j), rel=1e-9, abs=1e-13 * frobenius(weight))
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("condition", [1, 1e4, 1e12])
@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_reproduces_the_weight_to_the_rounding_of_its_storage(shape, dtype, condition):
    for fold in folds_of(shape[3:]):
        for k in {1, shape[2]}:
            weight = planted(shape, fold, k, condition, seed=13)[0].astype(dtype)
            full = min(matrix_shape(shape, fold, k)[2:])
            factors = factorize(weight, Option(fold, k, full), CPU)
            scale = frobenius(weight)
            assert frobenius(weight - compose(factors)) <= 1e-14 * scale
            # Two factors, each rounded once: |ΔŴ| <= (2u + u²) |D||E|, and tails of the tiny half-range.
            kept = stored(factors, dtype)
            product = compose(Factors(fold, np.abs(factors.encoder), np.abs(factors.decoder)))
            composed = compose(stored(kept, np.float64))
            bound = 2.1 * ROUNDOFF[dtype] * frobenius(product) + 1e-14 * scale
            if dtype is np.float16:
                bound += 1e-6 * scale
            assert frobenius(weight.astype(np.float64) - composed) <= bound


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES[::3])
def test_factors_are_balanced_and_signed(shape, fold, k, dtype):
    weight = np.random.default_rng(14).standard_normal(shape).astype(dtype)
    j = min(matrix_shape(shape, fold, k)[2:])
    sigma = np.linalg.svd(naive_fold(weight, fold, k), compute_uv=False)
    factors = factorize(weight, Option(fold, k, j), CPU)
    for group, i, rank in np.ndindex(shape[0], k, j):
        row, column = factors.encoder[group, i, rank], factors.decoder[group, :, i, rank].ravel()
        assert np.sum(row**2) == pytest.approx(sigma[group, i, rank], rel=1e-8)
        assert np.sum(column**2) == pytest.approx(sigma[group, i, rank], rel=1e-8)
        assert column[np.argmax(np.abs(column))] > 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_slices_give_zero_factors_and_the_others_their_own(shape, dtype):
    weight = np.random.default_rng(15).standard_normal(shape).astype(dtype)
    weight[:, :, 0] = 0
    k = shape[2]
    for fold in folds_of(shape[3:]):
        factors = factorize(weight, Option(fold, k, 1), CPU)
        assert np.all(np.isfinite(factors.encoder))
        assert not factors.encoder[:, 0].any()
        assert not factors.decoder[:, :, 0].any()
        assert k == 1 or factors.encoder[:, 1:].any(axis=(2, 3, *range(4, factors.encoder.ndim))).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 8, 12), (1, 12, 8), (2, 9, 9)])
def test_rank_deficient_weights_are_exact_from_their_rank_on(shape, dtype):
    g, f, c = shape
    rng = np.random.default_rng(16)
    weight = (rng.integers(-3, 4, (g, f, 2)) @ rng.integers(-3, 4, (g, 2, c))).astype(dtype)
    for j in range(2, min(f, c) + 1):
        factors = factorize(weight, Option(Fold.ENCODE, 1, j), CPU)
        assert np.all(np.isfinite(factors.encoder))
        assert np.all(np.isfinite(factors.decoder))
        assert frobenius(weight - compose(factors)) <= 1e-14 * frobenius(weight)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_strict_namespace_gives_the_same_factors(shape, dtype):
    weight = np.random.default_rng(17).standard_normal(shape).astype(dtype)
    for fold in folds_of(shape[3:]):
        full = min(matrix_shape(shape, fold, 1)[2:])
        option = Option(fold, 1, (full + 1) // 2)
        strict, numpy = factorize(weight, option, STRICT), factorize(weight, option, CPU)
        assert type(strict.encoder) is np.ndarray
        np.testing.assert_allclose(strict.encoder, numpy.encoder, atol=1e-12)
        np.testing.assert_allclose(strict.decoder, numpy.decoder, atol=1e-12)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (Option(Fold.ENCODE, 5, 1), "A layer's 6 input channels per group cannot be cut into k = 5 slices"),
        (Option(Fold.ENCODE, 0, 1), "cannot be cut into k = 0 slices"),
        (Option(Fold.ENCODE, 1, 0), "Rank j = 0 .* between 1 and the full rank 4"),
        (Option(Fold.ENCODE, 1, 5), "Rank j = 5 .* fold encode with k = 1.* full rank 4"),
        (Option(Fold.DECODE, 2, 4), "Rank j = 4 .* fold decode with k = 2.* full rank 3"),
    ],
)
def test_an_option_that_does_not_fit_is_a_plan_error(option, message):
    with pytest.raises(PlanError, match=message):
        factorize(np.ones((1, 4, 6, 3, 3), np.float32), option, CPU)


def exact_residual(weight, factors):
    """W − Ŵ and W as matrices of fractions per group, without any rounding, as encode matrices."""
    g, f, c, *kernel = weight.shape
    j, width = factors.encoder.shape[2:4]
    encoder, decoder = factors.encoder.astype(np.float64), factors.decoder.astype(np.float64)
    residual = np.empty((g, f, c, *kernel), object)
    for index in np.ndindex(residual.shape):
        group, feature, channel, *spatial = index
        enc = [0 if n == 1 else p for n, p in zip(encoder.shape[4:], spatial, strict=True)]
        dec = [0 if n == 1 else p for n, p in zip(decoder.shape[4:], spatial, strict=True)]
        i, inner = divmod(channel, width)
        value = Fraction(float(weight[index]))
        for rank in range(j):
            left = decoder[(group, feature, i, rank, *dec)]
            value -= Fraction(float(left)) * Fraction(float(encoder[(group, i, rank, inner, *enc)]))
        residual[index] = value
    return residual.reshape(g, f, -1)


def squared_frobenius(matrix):
    return sum((Fraction(value) ** 2 for value in matrix.ravel()), Fraction(0))


def below_spectral_squared(matrix, bound):
    """Whether λ_max(M Mᵀ) < bound², by exact elimination: bound² I − M Mᵀ is positive definite."""
    matrix = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    n = matrix.shape[0]
    work = [
        [-sum(a * b for a, b in zip(matrix[p], matrix[q], strict=True)) for q in range(n)] for p in range(n)
    ]
    for p in range(n):
        work[p][p] += bound
    for p in range(n):
        if work[p][p] <= 0:
            return False
        for q in range(p + 1, n):
            ratio = work[q][p] / work[p][p]
            work[q] = [b - ratio * a for a, b in zip(work[p], work[q], strict=True)]
    return True


EXACT = [((1, 3, 4), 1, 2), ((2, 4, 2), 2, 1), ((1, 2, 2, 2, 2), 1, 1), ((1, 3, 2, 2, 1), 2, 1)]


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize(("shape", "k", "j"), EXACT)
def test_certificate_is_above_the_truth_and_tight_in_exact_arithmetic(shape, k, j, dtype):
    weight = np.random.default_rng(18).integers(-4, 5, shape).astype(dtype)
    for fold in folds_of(shape[3:]):
        kept = stored(factorize(weight, Option(fold, k, j), CPU), dtype)
        certificate = certify(weight, kept)
        residual = exact_residual(weight, kept)
        for group in range(shape[0]):
            original = np.vectorize(lambda x: Fraction(float(x)), otypes=[object])(weight[group])
            original = original.reshape(shape[1], -1)
            relative = Fraction(certificate.frobenius[group]) ** 2 * squared_frobenius(original)
            true = squared_frobenius(residual[group])
            assert relative >= true
            assert relative <= true * (1 + Fraction(1e-9)) + Fraction(1e-18) * squared_frobenius(original)
            assert_brackets(certificate.spectral[group], original, residual[group])


def assert_brackets(certified, original, residual):
    """The certified ratio is at least the true one and at most 1e-9 above it, all in fractions."""
    norm = np.linalg.svd(original.astype(np.float64), compute_uv=False)[0]
    below, above = (Fraction(norm * (1 + shift)) ** 2 for shift in (-1e-13, 1e-13))
    assert below_spectral_squared(original, above)
    assert not below_spectral_squared(original, below)
    # certified · ‖W‖ still exceeds ‖R‖, up to the width of that bracket ...
    assert below_spectral_squared(residual, Fraction(certified) ** 2 * above)
    # ... and 1e-9 less does not.
    smaller = Fraction(max(certified - 1e-9, 0.0)) ** 2 * below
    assert not below_spectral_squared(residual, smaller)


@pytest.mark.parametrize("dtype", list(ROUNDOFF))
@pytest.mark.parametrize("seed", range(20))
def test_certificate_is_above_the_truth_to_the_last_bit(seed, dtype):
    # Hadamard's matrix of order 4 has the norms 2 and 4 exactly, so no float stands between.
    two = np.array([[1, 1], [1, -1]])
    weight = np.kron(two, two).astype(dtype).reshape(1, 4, 4)
    rng = np.random.default_rng(seed)
    encoder, decoder = rng.standard_normal((1, 1, 2, 4)), rng.standard_normal((1, 4, 1, 2))
    kept = stored(Factors(Fold.ENCODE, encoder, decoder), dtype)
    certificate = certify(weight, kept)
    residual = exact_residual(weight, kept)[0]
    assert below_spectral_squared(residual, 4 * Fraction(certificate.spectral[0]) ** 2)
    assert squared_frobenius(residual) <= 16 * Fraction(certificate.frobenius[0]) ** 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 2, 8, 64])
@pytest.mark.parametrize("numerator", [0, 1, 3, 7])
def test_certificate_of_a_known_ratio(n, numerator, dtype):
    # W = 8 I, Ŵ = (8 − numerator) I: both relative norms are numerator / 8, exactly.
    weight = 8 * np.eye(n, dtype=dtype).reshape(1, n, n)
    encoder = np.eye(n, dtype=dtype).reshape(1, 1, n, n)
    decoder = (8 - numerator) * np.eye(n, dtype=dtype).reshape(1, n, 1, n)
    certificate = certify(weight, Factors(Fold.ENCODE, encoder, decoder))
    for value in (*certificate.spectral, *certificate.frobenius):
        assert numerator / 8 <= value <= numerator / 8 + 1e-9


@pytest.mark.parametrize(("shape", "fold", "k"), CASES)
def test_certificate_is_of_the_encode_matrix_whatever_the_fold(shape, fold, k):
    weight = np.random.default_rng(19).standard_normal(shape).astype(np.float32)
    j = (min(matrix_shape(shape, fold, k)[2:]) + 1) // 2
    factors = stored(factorize(weight, Option(fold, k, j), CPU), np.float32)
    certificate = certify(weight, factors)
    composed = compose(stored(factors, np.longdouble))
    residual = (weight - composed).astype(np.float64).reshape(*shape[:2], -1)
    matrices = weight.astype(np.float64).reshape(*shape[:2], -1)
    spectral = np.linalg.norm(residual, 2, axis=(1, 2)) / np.linalg.norm(matrices, 2, axis=(1, 2))
    total = np.linalg.norm(residual, axis=(1, 2)) / np.linalg.norm(matrices, axis=(1, 2))
    np.testing.assert_allclose(certificate.spectral, spectral, rtol=0, atol=1e-9)
    np.testing.assert_allclose(certificate.frobenius, total, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(2, 12, 20), (1, 30, 12), (1, 6, 8, 3, 3)])
def test_a_part_of_the_eigenvectors_gives_the_same_factors(shape, monkeypatch):
    weight = np.random.default_rng(23).standard_normal(shape).astype(np.float32)
    for fold in folds_of(shape[3:]):
        option = Option(fold, 2, min(matrix_shape(shape, fold, 2)[2:]) // 2)
        every = factorize(weight, option, CPU)
        with monkeypatch.context() as patch:
            patch.setattr("onnx_lowrank.linalg.factorize._MANY", 2)
            patch.setattr("onnx_lowrank.linalg.factorize.eigenvectors", None)
            part = factorize(weight, option, CPU)
        np.testing.assert_allclose(part.encoder, every.encoder, rtol=0, atol=1e-12)
        np.testing.assert_allclose(part.decoder, every.decoder, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_certificate_does_not_depend_on_the_scale(scale):
    weight = np.random.default_rng(20).standard_normal((1, 12, 20)) * scale
    factors = factorize(weight, Option(Fold.ENCODE, 1, 4), CPU)
    sigma = np.linalg.svd(weight[0], compute_uv=False)
    certificate = certify(weight, factors)
    assert certificate.spectral[0] == pytest.approx(sigma[4] / sigma[0], rel=1e-9)
    assert certificate.frobenius[0] == pytest.approx(
        tail(sigma / scale, 4) / tail(sigma / scale, 0), rel=1e-9
    )


@pytest.mark.parametrize("exponent", [-50, -600, -1074])
def test_certificate_of_a_residual_far_below_the_weight(exponent):
    weight = np.diag([1.0, 2.0**exponent]).reshape(1, 2, 2)
    certificate = certify(weight, factorize(weight, Option(Fold.ENCODE, 1, 1), CPU))
    for value in (*certificate.spectral, *certificate.frobenius):
        assert 2.0**exponent <= value <= 2.0**exponent + 1e-14


def test_certificate_speaks_of_each_group():
    weight = np.stack([np.eye(4), np.zeros((4, 4)), np.diag([4.0, 1, 0, 0])])
    certificate = certify(weight, factorize(weight, Option(Fold.ENCODE, 1, 1), CPU))
    assert certificate.spectral == pytest.approx((1, 0, 0.25), abs=1e-12)
    assert certificate.frobenius == pytest.approx((math.sqrt(0.75), 0, 1 / math.sqrt(17)), abs=1e-12)
    assert certificate.spectral[1] == certificate.frobenius[1] == 0


def test_nothing_can_be_certified_about_a_zero_weight_with_other_factors():
    factors = Factors(Fold.ENCODE, np.ones((1, 1, 1, 2)), np.ones((1, 2, 1, 1)))
    assert certify(np.zeros((1, 2, 2)), factors).spectral == (math.inf,)


@pytest.mark.parametrize(("f", "c"), [(150, 150), (300, 300), (64, 900), (900, 64)])
def test_certificate_stays_tight_for_larger_matrices(f, c):
    rng = np.random.default_rng(21)
    n = min(f, c)
    sigma = np.geomspace(1, 1e-3, n)
    left, right = (np.linalg.qr(rng.standard_normal((size, n)))[0] for size in (f, c))
    weight = ((left * sigma) @ right.T).reshape(1, f, c)
    certificate = certify(weight, factorize(weight, Option(Fold.ENCODE, 1, n // 2), CPU))
    assert 0 <= certificate.spectral[0] - sigma[n // 2] <= 1e-9
    assert 0 <= certificate.frobenius[0] - tail(sigma, n // 2) / tail(sigma, 0) <= 1e-9


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_cupy_agrees_with_numpy(shape, dtype, cuda):
    weight = np.random.default_rng(22).standard_normal(shape).astype(dtype)
    for fold in folds_of(shape[3:]):
        option = Option(fold, 1, (min(matrix_shape(shape, fold, 1)[2:]) + 1) // 2)
        on_gpu, on_cpu = factorize(weight, option, cuda), factorize(weight, option, CPU)
        assert type(on_gpu.encoder) is np.ndarray
        np.testing.assert_allclose(on_gpu.encoder, on_cpu.encoder, atol=1e-11)
        np.testing.assert_allclose(on_gpu.decoder, on_cpu.decoder, atol=1e-11)


# --- the certificate of a product -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 3, 7), (1, 1, 1), (8, 8, 8), (2, 40, 3)])
def test_a_product_is_certified_as_it_is_stored(dtype, shape):
    f, m, n = shape
    rng = np.random.default_rng(f + m)
    first, second = rng.standard_normal((m, n)), rng.standard_normal((f, m))
    stored = (second @ first).astype(dtype)
    certificate = certify_product(first, second, stored)
    exact = second.astype(np.longdouble) @ first.astype(np.longdouble)
    residual = (exact - stored.astype(np.longdouble)).astype(np.float64)
    lost = np.linalg.norm(residual, 2) / np.linalg.norm(second @ first, 2)
    assert lost <= certificate.spectral[0] <= 1.01 * lost + 1e-12
    lost = np.linalg.norm(residual) / np.linalg.norm(second @ first)
    assert lost <= certificate.frobenius[0] <= 1.01 * lost + 1e-12


def test_a_wrong_product_has_a_large_certificate():
    first, second = np.eye(4), np.diag([3.0, 2.0, 1.0, 0.5])
    stored = second.copy()
    stored[1, 1] = 0
    certificate = certify_product(first, second, stored)
    assert certificate.spectral[0] == pytest.approx(2 / 3, rel=1e-9)
    assert certificate.frobenius[0] == pytest.approx(2 / np.sqrt(14.25), rel=1e-9)


@pytest.mark.parametrize(
    ("first", "second", "stored", "bound"),
    [
        (np.zeros((2, 3)), np.zeros((4, 2)), np.zeros((4, 3)), 0.0),
        (np.zeros((2, 3)), np.ones((4, 2)), np.ones((4, 3)), np.inf),
        # The exact product is zero, which rounding cannot tell from a small one.
        (np.array([[1.0], [-1.0]]), np.array([[1.0, 1.0]]), np.zeros((1, 1)), np.inf),
    ],
)
def test_a_product_that_may_be_zero_has_no_relative_error(first, second, stored, bound):
    assert certify_product(first, second, stored).spectral == (bound,)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_nothing_is_proved_of_factors_that_are_not_finite(value):
    weight = np.random.default_rng(0).standard_normal((2, 6, 8))
    factors = factorize(weight, Option(Fold.ENCODE, 1, 3), CPU)
    factors.encoder[0, 0, 0, 0] = value
    with np.errstate(invalid="ignore"):
        found = certify(weight, factors)
    assert found.spectral[0] == found.frobenius[0] == np.inf
    assert found.spectral[1] < 1


def test_all_eigenvectors_are_computed_where_a_part_fails(monkeypatch):
    def failing(gram, count):
        raise np.linalg.LinAlgError

    weight = np.random.default_rng(5).standard_normal((1, 24, 40, 1, 1)).astype(np.float32)
    option = Option(Fold.ENCODE, 1, 6)
    usual = factorize(weight, option, CPU)
    monkeypatch.setattr("onnx_lowrank.linalg.factorize._MANY", 2)
    monkeypatch.setattr("onnx_lowrank.linalg.native.top_eigenvectors", failing)
    again = factorize(weight, option, CPU)
    assert np.array_equal(again.encoder, usual.encoder)
    assert np.array_equal(again.decoder, usual.decoder)
