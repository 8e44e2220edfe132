"""A tied layer: the errors of both uses against those of the dense matrices, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.core.factors import Moments
from onnx_lowrank.errors import InputError
from onnx_lowrank.linalg import quadratic
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.tied import error, errors, fit, tied

N, TOKENS = 12, 90


@pytest.fixture
def case():
    """A table (features first), the frequencies of its rows, and features that its transpose reads."""
    rng = np.random.default_rng(5)
    table = (rng.standard_normal((N, N)) * np.arange(1, N + 1) ** -0.7) @ rng.standard_normal((N, TOKENS))
    share = 1 / np.arange(1.0, TOKENS + 1)
    features = rng.standard_normal((400, N)) @ rng.standard_normal((N, N)) + 0.3
    return table, share / share.sum(), features


def of_rows(table, share, count=500):
    mean = table @ share
    return Moments(count, mean[None], ((table * share) @ table.T - np.outer(mean, mean))[None])


def of_features(features):
    return Moments(len(features), features.mean(axis=0)[None], np.cov(features.T, bias=True)[None])


def direct(table, share, features, approximated, level=(0.0, 0.0)):
    """Both relative errors, added, from the tokens and the features themselves.

    `level` is the ridge of each use, relative to its power: equal tokens, and equal directions.
    """
    total = 0.0
    lost = table - approximated
    weights = share + level[0] * (share @ np.sum(table**2, axis=0)) / np.sum(table**2)
    total += (weights @ np.sum(lost**2, axis=0)) / (weights @ np.sum(table**2, axis=0))
    power = np.mean(features**2)
    spread = features.T @ features / len(features) + level[1] * power * np.eye(N)
    return total + np.trace(lost.T @ spread @ lost) / np.trace(table.T @ spread @ table)


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("j", [1, 5, N - 1])
def test_the_error_of_a_rank_is_that_of_its_factors_at_both_uses(case, flipped, j):
    table, share, features = case
    weight = (table.T if flipped else table)[None]
    problem = tied(weight, of_rows(table, share), of_features(features), flipped=flipped, ridged=False)
    product = compose(fit(problem, j))
    assert product.shape == weight.shape
    assert np.linalg.matrix_rank(product[0]) == j
    wanted = direct(table, share, features, product[0].T if flipped else product[0])
    assert errors(problem)[j] == pytest.approx(wanted, rel=1e-10)
    assert error(problem, product) == pytest.approx(wanted, rel=1e-8)


def test_a_ridge_counts_every_token_and_every_direction(case):
    table, share, features = case
    rows, read = of_rows(table, share), of_features(features)
    levels = tuple(quadratic.shrinkage(moments, quadratic.INPUT_RIDGE) for moments in (rows, read))
    problem = tied(table[None], rows, read, flipped=False, ridged=True)
    product = compose(fit(problem, 4))[0]
    assert errors(problem)[4] == pytest.approx(direct(table, share, features, product, levels), rel=1e-10)


def test_nothing_is_lost_at_full_rank_and_everything_at_rank_zero(case):
    table, share, features = case
    problem = tied(table[None], of_rows(table, share), of_features(features), flipped=False, ridged=True)
    assert errors(problem)[0] == pytest.approx(2, rel=1e-12)
    assert errors(problem)[N] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("j", [2, 6])
def test_it_does_better_than_a_fit_to_one_of_the_uses(case, j):
    table, share, features = case
    problem = tied(table[None], of_rows(table, share), of_features(features), flipped=False, ridged=False)
    top = np.linalg.eigh((table * share) @ table.T)[1][:, -j:]
    spread = np.linalg.cholesky(features.T @ features / len(features)).T
    left = np.linalg.svd(spread @ table)[0][:, :j]
    heads = np.linalg.solve(spread, left @ (left.T @ spread @ table))
    best = errors(problem)[j]
    assert best < direct(table, share, features, top @ (top.T @ table))
    assert best < direct(table, share, features, heads)


def test_a_table_of_zeros_loses_nothing(case):
    table, share, features = case
    rows = of_rows(0 * table, share)
    problem = tied(0 * table[None], rows, of_features(features), flipped=False, ridged=True)
    assert errors(problem).tolist() == [0.0] * (N + 1)


def test_moments_that_are_not_finite_are_refused(case):
    table, share, features = case
    rows, read = of_rows(table, share), of_features(features)
    broken = Moments(read.count, read.mean, np.full_like(read.second, np.nan))
    with pytest.raises(InputError, match="not finite"):
        tied(table[None], rows, broken, flipped=False, ridged=False)
