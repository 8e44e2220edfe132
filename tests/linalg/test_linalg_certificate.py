"""Certificates in blocks are the same as of a whole weight, and their parts prove what they say."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.core.factors import Factors, KeptRows
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg import certificate
from onnx_lowrank.linalg.backend import in_turn, resolve
from onnx_lowrank.linalg.certificate import certify, certify_product, certify_weight
from onnx_lowrank.linalg.factorize import factorize
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.work.executor import Threads

CPU = resolve("cpu")


def drawn(shape, dtype):
    return np.random.default_rng(len(shape)).standard_normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("block", [1, 7, 40, 144, 200])
@pytest.mark.parametrize(
    ("shape", "fold", "k"),
    [
        ((1, 12, 20), Fold.ENCODE, 5),
        ((1, 12, 20), Fold.ENCODE, 1),
        ((1, 30, 12), Fold.ENCODE, 3),
        ((2, 6, 8, 3, 3), Fold.ROWS, 2),
        ((2, 6, 8, 3, 3), Fold.DECODE, 4),
        ((1, 50, 2, 3, 3), Fold.COLS, 2),
    ],
)
def test_the_blocks_of_a_certificate_do_not_matter(shape, fold, k, block, dtype, monkeypatch):
    weight = drawn(shape, dtype)
    stored = factorize(weight, Option(fold, k, 1), CPU).astype(np.dtype(dtype))
    whole, product = certify(weight, stored), certify_weight(weight, compose(stored))
    monkeypatch.setattr(certificate, "_BLOCK", block)
    monkeypatch.setattr(certificate, "_PANEL", 5)
    monkeypatch.setattr(certificate, "_ITERATED", 4)
    again = certify(weight, stored), certify_weight(weight, compose(stored))
    for expected, found in zip((whole, product), again, strict=True):
        np.testing.assert_allclose(found.spectral, expected.spectral, rtol=1e-9)
        np.testing.assert_allclose(found.frobenius, expected.frobenius, rtol=1e-12)


@pytest.mark.parametrize("shape", [(1, 12, 20), (1, 30, 12), (2, 6, 8, 3, 3)])
def test_idle_threads_change_no_bit_of_a_certificate(shape, monkeypatch):
    weight = drawn(shape, np.float32)
    stored = factorize(weight, Option(Fold.ENCODE, 2, 2), CPU).astype(np.dtype(np.float32))
    monkeypatch.setattr(certificate, "_BLOCK", 20)
    monkeypatch.setattr(certificate, "_PANEL", 5)
    alone = certify(weight, stored), certify_weight(weight, compose(stored))
    with Threads(CPU, number=3) as threads:
        shared = threads.backend.shared
        assert (certify(weight, stored, shared), certify_weight(weight, compose(stored), shared)) == alone


@pytest.mark.parametrize("block", [3, 11, 1000])
def test_kept_rows_count_in_their_block(block, monkeypatch):
    weight = drawn((1, 5, 17), np.float32)
    made = factorize(weight, Option(Fold.ENCODE, 1, 2), CPU).astype(np.dtype(np.float32))
    rows = KeptRows(np.array([0, 4, 10, 16]), weight[0][:, [0, 4, 10, 16]])
    encoder = made.encoder.copy()
    encoder[:, :, :, rows.indices] = 0
    monkeypatch.setattr(certificate, "_BLOCK", block)
    proof = certify(weight, Factors(Fold.ENCODE, encoder, made.decoder, rows))
    residual = weight - compose(Factors(Fold.ENCODE, encoder, made.decoder, rows))
    expected = np.linalg.norm(residual.astype(np.float64)) / np.linalg.norm(weight.astype(np.float64))
    assert proof.frobenius[0] == pytest.approx(expected, rel=1e-6)


def test_rounding_errors_are_those_of_float64():
    # γ_n = nu / (1 − nu) for u = 2⁻⁵³
    assert certificate._gamma(1 << 50) == pytest.approx(1 / 7, rel=1e-15)
    assert certificate._gamma(1 << 52) == 1


def test_a_product_that_cancels_is_certified_less_its_own_rounding():
    # B · A is 2⁻³⁰, and its rounding error up to γ₁₀ ‖A‖ ‖B‖; nothing of it is stored.
    first, second = np.ones((2, 1)), np.array([[1.0, 2.0**-30 - 1]])
    error = certificate._gamma(10) * np.linalg.norm(first) * np.linalg.norm(second) * 2.0**30
    found = certify_product(first, second, np.zeros((1, 1)))
    expected = (1 + error) / (1 - error)
    assert (found.spectral[0], found.frobenius[0]) == pytest.approx((expected, expected), rel=1e-13)


def test_taken_is_some_blocks_and_the_gram_matrices_of_the_smaller_side():
    assert certificate.taken((1, 5, 7)) == 24 * 35 + 40 * 25
    assert certificate.taken((3, 4096, 512, 3, 3)) == 24 * 4 * 2**20 + 40 * 4096**2


def test_a_frobenius_norm_lies_between_its_bounds():
    below, above = certificate._frobenius(np.array([[3.0, 0.0], [0.0, 4.0]]))
    assert 5 - 1e-14 < below < 5 < above < 5 + 1e-14


@pytest.mark.parametrize(
    ("shape", "width", "expected"),
    [
        ((1, 12, 20), 20, [3, 3, 3, 3, 3, 3, 2]),  # 40 elements are 3 channels
        ((1, 12, 20), 4, [3, 1] * 5),
        ((1, 12, 20), 3, [3] * 6 + [2]),
        ((1, 4, 20), 4, [8, 8, 4]),  # whole slices
        ((1, 20, 4), 2, [10, 10]),  # features
        ((1, 12, 20, 3), 20, [1] * 20),
    ],
)
def test_blocks_have_a_bounded_size_and_end_with_their_slices(shape, width, expected, monkeypatch):
    monkeypatch.setattr(certificate, "_BLOCK", 40)
    parts = list(certificate._slices(np.zeros(shape), width))
    assert [part.stop - part.start for part in parts] == expected
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]


@pytest.mark.parametrize(
    ("matrix", "exact"), [(np.ones((1, 1 << 16)), 256), (np.ones((1 << 16, 1)), 256), (np.eye(64), 1)]
)
def test_a_largest_singular_value_lies_between_its_bounds(matrix, exact):
    is_high = len(matrix) > matrix.shape[1]
    measured = certificate._measured(certificate._Blocks([matrix].__getitem__, 1, is_high, in_turn))
    below, above = certificate._spectral_below(measured), certificate._spectral_above(measured)
    assert exact * (1 - 1e-10) < below < exact < above < exact * (1 + 1e-10)


def test_a_shift_is_proven_only_above_the_largest_eigenvalue():
    vectors = np.linalg.qr(drawn((5, 5), np.float64))[0]
    gram = vectors @ np.diag([1.0, 2.0, 3.0, 4.0, 5.0]) @ vectors.T
    assert not certificate._is_above(4.999, gram)
    assert certificate._is_above(5.001, gram)


def test_a_shift_that_proves_nothing_is_raised_until_one_does(monkeypatch):
    weight = drawn((1, 12, 20), np.float64)
    kept = Factors(Fold.ENCODE, np.zeros((1, 1, 1, 20)), np.zeros((1, 12, 1, 1)))
    expected, tried, is_above = certify(weight, kept).spectral[0], [], certificate._is_above

    def refusing(shift, gram):
        tried.append(shift)
        return is_above(shift, gram) and len(tried) > 3

    monkeypatch.setattr(certificate, "_is_above", refusing)
    found = certify(weight, kept).spectral[0]
    top = np.linalg.norm(weight[0], 2) ** 2
    margins = [shift / top - 1 for shift in tried]
    assert margins[1:] == pytest.approx([2 * margin for margin in margins[:-1]], rel=0.05)
    assert expected < found < expected + 1e-11


@pytest.mark.parametrize("shape", [(1, 5, 90), (1, 90, 5), (1, 40, 2, 3, 3)])
def test_gram_matrices_are_of_the_smaller_side(shape, monkeypatch):
    weight, sides, top = drawn(shape, np.float32), set(), certificate._top

    def noting(gram):
        sides.add(len(gram))
        return top(gram)

    monkeypatch.setattr(certificate, "_top", noting)
    certify(weight, factorize(weight, Option(Fold.ENCODE, 1, 1), CPU))
    assert sides == {min(shape[1], weight[0, 0].size)}
    sides.clear()
    second, first = weight.reshape(shape[1], -1), drawn((weight[0, 0].size, 7), np.float64)
    certify_product(first, second, (second @ first).astype(np.float32))
    assert sides == {min(shape[1], 7)}
