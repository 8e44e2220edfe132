"""Spectra against the SVD of slices folded by loops."""

import ml_dtypes
import numpy as np
import pytest
from linalg_reference import CASES, SHAPES, divisors, folds_of, naive_fold, planted

from devices import fake
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg import spectra as spectra_module
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.spectra import spectra

CPU = resolve("cpu")
STRICT = fake()


def reference(weight, fold, k):
    return np.linalg.svd(naive_fold(weight.astype(np.float64), fold, k), compute_uv=False)


def assert_by_gram(found, expected):
    """Squares agree to rounding, which is the accuracy that a Gram matrix gives."""
    assert found.shape == expected.shape
    assert found.dtype == np.float64
    assert np.all(found >= 0)
    assert np.all(np.diff(found, axis=-1) <= 0)
    np.testing.assert_allclose(found**2, expected**2, rtol=0, atol=2e-14 * np.max(expected) ** 2)


@pytest.mark.parametrize("condition", [1, 1e3, 1e6])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES)
def test_planted_spectrum_of_float32_is_recovered(shape, fold, k, condition):
    weight, sigma = planted(shape, fold, k, condition, seed=4)
    single = weight.astype(np.float32)
    found = spectra(single, {fold: [k]}, CPU)[fold, k]
    assert_by_gram(found, reference(single, fold, k))
    # Rounding the weight moves its singular values by no more than its own norm.
    np.testing.assert_allclose(found, np.broadcast_to(sigma, found.shape), rtol=0, atol=1e-6)


@pytest.mark.parametrize("condition", [1e3, 1e12])
@pytest.mark.parametrize(("shape", "fold", "k"), CASES)
def test_planted_spectrum_of_float64_is_recovered_to_its_last_digits(shape, fold, k, condition):
    weight, sigma = planted(shape, fold, k, condition, seed=5)
    found = spectra(weight, {fold: [k]}, CPU)[fold, k]
    np.testing.assert_allclose(found, np.broadcast_to(sigma, found.shape), rtol=0, atol=3e-15)


@pytest.mark.parametrize("backend", [CPU, STRICT], ids=["numpy", "strict"])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_all_folds_and_slices_at_once(shape, dtype, backend):
    weight = np.random.default_rng(6).standard_normal(shape).astype(dtype)
    before = weight.copy()
    wanted = dict.fromkeys(folds_of(shape[3:]), divisors(shape[2]))
    found = spectra(weight, wanted, backend)
    assert set(found) == {(fold, k) for fold, counts in wanted.items() for k in counts}
    for (fold, k), sigma in found.items():
        assert type(sigma) is np.ndarray
        assert_by_gram(sigma, reference(weight, fold, k))
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("counts", [[1], [24], [4, 6], [6, 4], [24, 2], [8, 12, 3], divisors(24)])
@pytest.mark.parametrize("features", [1, 2, 5, 6, 30])
def test_any_choice_of_slices_including_several_chains_of_divisors(counts, features):
    weight = np.random.default_rng(7).standard_normal((2, features, 24, 2, 1)).astype(np.float32)
    for fold in Fold:
        found = spectra(weight, {fold: counts}, CPU)
        assert set(found) == {(fold, k) for k in counts}
        for k in counts:
            assert_by_gram(found[fold, k], reference(weight, fold, k))


@pytest.mark.parametrize("counts", [[2, 3], [3, 4, 6], [4, 6, 7, 12, 14], [2, 3, 12], divisors(84)])
def test_entries_of_coarser_gram_matrices_are_copied(counts, monkeypatch):
    weight = np.random.default_rng(11).integers(-4, 5, (2, 50, 84)).astype(np.float32)
    apart = {k: spectra(weight, {Fold.ENCODE: [k]}, CPU)[Fold.ENCODE, k] for k in counts}
    monkeypatch.setattr(spectra_module, "_KNOWN", 1)
    together = spectra(weight, {Fold.ENCODE: counts}, CPU)
    for k in counts:
        # All Gram matrices are exact.
        np.testing.assert_array_equal(together[Fold.ENCODE, k], apart[k])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 2])
def test_rank_deficient_weight_has_noise_for_its_zeros(rank, dtype):
    rng = np.random.default_rng(8)
    factors = rng.integers(-3, 4, (8, rank)), rng.integers(-3, 4, (rank, 12))
    weight = (factors[0] @ factors[1]).reshape(1, 8, 12).astype(dtype)
    for k in divisors(12):
        sigma = spectra(weight, {Fold.ENCODE: [k]}, CPU)[Fold.ENCODE, k]
        expected = reference(weight, Fold.ENCODE, k)
        assert np.all(np.isfinite(sigma))
        assert np.all(sigma[..., rank:] < 1e-7 * expected.max())
        np.testing.assert_allclose(sigma[..., :1], expected[..., :1], rtol=1e-13)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_weight_has_zero_spectra(shape, dtype):
    wanted = dict.fromkeys(folds_of(shape[3:]), divisors(shape[2]))
    for sigma in spectra(np.zeros(shape, dtype), wanted, CPU).values():
        np.testing.assert_array_equal(sigma, 0)


@pytest.mark.parametrize("scale", [1e-38, 1e38])
def test_the_ends_of_the_float32_range(scale):
    weight = (np.random.default_rng(9).uniform(-1, 1, (1, 6, 8, 3, 3)) * scale).astype(np.float32)
    for fold in Fold:
        for (_, k), sigma in spectra(weight, {fold: [1, 4, 8]}, CPU).items():
            assert_by_gram(sigma / scale, reference(weight, fold, k) / scale)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_cupy_agrees_with_numpy(shape, dtype, cuda):
    weight = np.random.default_rng(10).standard_normal(shape).astype(dtype)
    wanted = dict.fromkeys(folds_of(shape[3:]), divisors(shape[2]))
    on_gpu = spectra(weight, wanted, cuda)
    for key, sigma in spectra(weight, wanted, CPU).items():
        assert type(on_gpu[key]) is np.ndarray
        np.testing.assert_allclose(on_gpu[key] ** 2, sigma**2, rtol=0, atol=2e-14 * sigma.max() ** 2)
