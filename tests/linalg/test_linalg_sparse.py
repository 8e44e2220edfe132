"""Tables that keep rows, against a direct computation in float64."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.linalg import sparse
from onnx_lowrank.linalg.certificate import certify
from onnx_lowrank.linalg.folding import compose

ROWS, FEATURES = 400, 12


def table(seed=0, rows=ROWS, features=FEATURES):
    """A table whose rows lie along few directions, but for some of them."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((features, 4)) @ rng.standard_normal((4, rows))
    matrix[:, ::50] += rng.standard_normal((features, len(matrix[0, ::50]))) * 3
    return matrix[None].astype(np.float32)


def counts(seed=0, rows=ROWS):
    """Frequencies as of words: few rows are read often, most never."""
    rng = np.random.default_rng(seed)
    return rng.permutation((1000 / np.arange(1, rows + 1) ** 1.5).astype(np.int64))


def weighted(weight, made, weights):
    """Σ w_i ‖x_i − x̂_i‖² / Σ w_i ‖x_i‖²."""
    lost = (weight[0].astype(np.float64) - made[0]) ** 2
    return lost.sum(axis=0) @ weights / ((weight[0].astype(np.float64) ** 2).sum(axis=0) @ weights)


@pytest.mark.parametrize("per_rank", [1, 3, 10])
@pytest.mark.parametrize("j", [1, 4, 12])
def test_the_curve_is_the_error_of_the_fit(j, per_rank):
    weight = table()
    weights = sparse.row_weights(weight, counts(), 0.1)
    curve = sparse.errors(weight, weights, per_rank, 1)
    factors = sparse.fit(weight, weights, per_rank, j)
    assert curve[0] == 1
    assert curve[j] == pytest.approx(weighted(weight, compose(factors), weights), abs=1e-12)


def test_kept_rows_are_exact_and_those_of_most_weighted_power():
    weight = table()
    weights = sparse.row_weights(weight, counts(), 0.1)
    factors = sparse.fit(weight, weights, 5, 3)
    power = weights * (weight[0].astype(np.float64) ** 2).sum(axis=0)
    assert sorted(factors.rows.indices) == sorted(np.argsort(-power, kind="stable")[:15])
    np.testing.assert_array_equal(factors.rows.values, weight[0][:, factors.rows.indices])
    assert not factors.encoder[..., factors.rows.indices].any()
    np.testing.assert_array_equal(compose(factors)[0][:, factors.rows.indices], factors.rows.values)
    assert factors.size == 3 * (ROWS + FEATURES) + 15 * FEATURES


def test_the_others_get_the_best_table_of_their_rank():
    """Eckart and Young for the weighted rows that do not stay."""
    weight = table()
    weights = sparse.row_weights(weight, counts(), 0.1)
    factors = sparse.fit(weight, weights, 5, 3)
    rest = np.delete(np.arange(ROWS), factors.rows.indices)
    scaled = weight[0][:, rest].astype(np.float64) * np.sqrt(weights[rest])
    tail = np.linalg.svd(scaled, compute_uv=False)[3:]
    lost = (weight[0] - compose(factors)[0])[:, rest] * np.sqrt(weights[rest])
    assert np.sum(lost**2) == pytest.approx(np.sum(tail**2), rel=1e-9)


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("per_rank", [0, 1, 20])
@pytest.mark.parametrize("seed", range(4))
def test_the_curve_never_rises(seed, per_rank, every):
    weight = table(seed)
    curve = sparse.errors(weight, sparse.row_weights(weight, counts(seed), 0.1), per_rank, every)
    assert curve.shape == (FEATURES + 1,)
    assert (np.diff(curve) <= 0).all()
    assert (curve >= 0).all()
    full = FEATURES // every * every
    assert curve[full] < 1e-12 or full < FEATURES


def test_kept_rows_beat_a_low_rank_at_equal_parameters():
    weight, read = table(), counts()
    weights = sparse.row_weights(weight, read, 0.1)
    low = sparse.errors(weight, weights, 0, 1)
    kept = sparse.errors(weight, weights, 4, 1)
    # At rank 4 the kept rows take 4 · 4 · 12 numbers, less than half a unit of rank.
    assert kept[4] < 0.5 * low[5]


def test_rows_that_are_never_read_count_a_little():
    weight, read = table(), np.zeros(ROWS, np.int64)
    read[:3] = 10
    weights = sparse.row_weights(weight, read, 0.25)
    power = (weight[0].astype(np.float64) ** 2).sum(axis=0)
    assert np.ptp(weights[3:]) == 0
    floor = weights[3:].max() * power.sum()
    assert floor == pytest.approx(0.25 * (read / 30) @ power, rel=1e-9)


@pytest.mark.parametrize("read", [np.zeros(ROWS, np.int64), np.eye(1, ROWS, dtype=np.int64)[0]])
def test_tables_and_counts_of_zeros_have_finite_weights(read):
    weight = table()
    weight[..., 0] = 0
    weights = sparse.row_weights(weight, read, 0.1)
    assert np.isfinite(weights).all()
    assert weights.sum() > 0
    assert np.isfinite(sparse.row_weights(np.zeros_like(weight), read, 0.1)).all()
    assert not sparse.errors(np.zeros_like(weight), weights, 2, 1).any()


def test_the_error_told_counts_the_rows_that_are_read():
    weight, read = table(), counts(3)
    made = weight + np.random.default_rng(1).standard_normal(weight.shape).astype(np.float32)
    assert sparse.error(weight, made, read) == pytest.approx(weighted(weight, made, read), rel=1e-6)
    assert sparse.error(np.zeros_like(weight), made, read) == 0


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_the_certificate_holds(dtype):
    weight = table().astype(dtype)
    weights = sparse.row_weights(weight, counts(), 0.1)
    stored = sparse.fit(weight, weights, 5, 3).astype(np.dtype(dtype))
    lost = weight[0].astype(np.float64) - compose(stored.astype(np.dtype(np.float64)))[0]
    proof = certify(weight, stored)
    whole = weight[0].astype(np.float64)
    assert np.linalg.norm(lost, 2) / np.linalg.norm(whole, 2) <= proof.spectral[0] < 1
    assert np.linalg.norm(lost) / np.linalg.norm(whole) <= proof.frobenius[0]
    assert np.linalg.norm(lost) / np.linalg.norm(whole) == pytest.approx(proof.frobenius[0], rel=1e-6)
