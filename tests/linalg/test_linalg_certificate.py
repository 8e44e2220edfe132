"""Certificates in blocks: the same as of a whole weight."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.core.factors import Factors, KeptRows
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.linalg import certificate
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.certificate import certify, certify_weight
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
