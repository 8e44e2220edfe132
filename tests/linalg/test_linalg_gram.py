"""Gram matrices in blocks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from onnx_lowrank.linalg import gram
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.linalg.gram import column_blocks, row_grams

CPU = resolve("cpu")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_integers_give_the_exact_matrix(
    dtype: type, is_transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gram, "BLOCK", 64)
    monkeypatch.setattr(gram, "_COLUMNS", 4)
    whole = np.random.default_rng(0).integers(-4, 5, (2, 3, 5, 23)).astype(np.int64)
    matrices = whole.astype(dtype)
    if is_transposed:
        whole, matrices = whole.mT, matrices.mT
    found = row_grams(matrices, CPU)
    assert found.dtype == np.float64
    np.testing.assert_array_equal(found, whole @ whole.mT)


def test_blocks_hold_all_columns_in_order_and_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "BLOCK", 60)
    monkeypatch.setattr(gram, "_COLUMNS", 4)
    matrices = np.arange(2 * 3 * 47, dtype=np.float32).reshape(2, 3, 47)
    blocks = list(column_blocks(matrices))
    assert [block.shape[-1] for block in blocks] == [10, 10, 10, 10, 7]
    np.testing.assert_array_equal(np.concatenate(blocks, axis=-1), matrices)


def test_a_small_weight_is_one_block_and_float64_is_not_copied() -> None:
    matrices = np.ones((1, 2, 3))
    (block,) = column_blocks(matrices)
    assert np.shares_memory(block, matrices)
