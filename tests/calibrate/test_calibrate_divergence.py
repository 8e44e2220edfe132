"""Divergences of scores of tokens, against SciPy in float64."""

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from onnx_lowrank.calibrate.divergence import are_token_scores, divergence, log_shares, spread

RNG = np.random.default_rng(0)
IDS = np.array([[3, 0, 6, 1], [2, 2, 5, 4]])


@pytest.mark.parametrize(
    ("shape", "feed", "expected"),
    [
        ((2, 4, 7), {"input_ids": IDS}, True),
        ((2, 4, 50), {"mask": np.ones((2, 4), np.int64), "input_ids": IDS}, True),
        ((2, 4, 6), {"input_ids": IDS}, False),
        ((2, 7), {"input_ids": IDS}, False),
        ((2, 1, 7), {"input_ids": IDS}, False),
        ((2, 4, 7), {"x": IDS.astype(np.float32)}, False),
        ((2, 4, 7), {"mask": np.zeros((2, 4), np.int64)}, False),
    ],
    ids=["vocabulary", "larger", "classes of tokens", "pooled", "last token", "floats", "no ids"],
)
def test_scores_have_an_element_for_every_id(shape, feed, expected):
    assert are_token_scores(np.zeros(shape, np.float32), feed) == expected


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 5, 200])
def test_the_divergence_is_that_of_the_softmaxes(dtype, rows):
    wanted, given = RNG.standard_normal((2, rows, 2, 30)).astype(dtype) * 3
    expected = rel_entr(softmax(wanted.astype(float), -1), softmax(given.astype(float), -1)).sum()
    assert divergence(log_shares(wanted), given) == pytest.approx(expected, rel=1e-4)


def test_a_shift_of_all_scores_of_a_row_is_no_error():
    scores = RNG.standard_normal((3, 4, 30)).astype(np.float32)
    wanted = log_shares(scores)
    assert divergence(wanted, scores + RNG.standard_normal((3, 4, 1))) == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(wanted, log_softmax(scores, -1), atol=1e-5)


def test_hidden_rows_do_not_count():
    wanted = log_shares(RNG.standard_normal((2, 3, 9)).astype(np.float32))
    given = RNG.standard_normal((2, 3, 9)).astype(np.float32)
    whole = divergence(wanted[:, :2], given[:, :2])
    wanted[:, 2], given[:, 2] = np.nan, np.inf
    assert divergence(wanted, given) == pytest.approx(whole)
    assert spread([wanted]) == pytest.approx(spread([wanted[:, :2]]))


def test_scores_that_are_not_finite_are_lost():
    wanted = log_shares(np.zeros((1, 2, 4), np.float32))
    assert divergence(wanted, np.full((1, 2, 4), np.nan, np.float32)) == np.inf


def test_impossible_tokens_count_for_nothing():
    wanted = log_shares(np.array([[0.0, 0.0, -1e9]], np.float32))
    assert divergence(wanted, np.array([[0.0, 0.0, 5.0]], np.float32)) > 1
    assert divergence(wanted, np.array([[0.0, 0.0, -30.0]], np.float32)) == pytest.approx(0, abs=1e-6)


def test_the_spread_is_the_divergence_from_the_mean():
    batches = [RNG.standard_normal((n, 5, 12)).astype(np.float32) * 2 for n in (3, 1)]
    shares = softmax(np.concatenate([b.reshape(-1, 12) for b in batches]).astype(float), axis=1)
    expected = rel_entr(shares, shares.mean(axis=0)).sum()
    assert spread([log_shares(batch) for batch in batches]) == pytest.approx(expected, rel=1e-4)
    assert spread([log_shares(np.zeros((2, 3, 4), np.float32))]) == pytest.approx(0, abs=1e-6)
    assert spread([]) == 0
