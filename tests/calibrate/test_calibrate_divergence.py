"""Divergences of scores of tokens, against SciPy in float64."""

import numpy as np
import pytest
from scipy.special import log_softmax, rel_entr, softmax

from onnx_lowrank.calibrate.divergence import are_token_scores, divergence, log_shares, spread
from onnx_lowrank.engines.vocabularies import vocabularies
from padded import HIDDEN_STATES, WORDS, D, encoder, texts
from rewriting import model

RNG = np.random.default_rng(0)
IDS = np.array([[3, 0, 6, 1], [2, 2, 5, 4]])


@pytest.mark.parametrize(
    ("shape", "feed", "expected"),
    [
        ((2, 4, 7), {"input_ids": IDS}, True),
        ((2, 4, 7), {"mask": np.ones((2, 4), np.int64), "input_ids": IDS}, True),
        ((2, 4, 50), {"input_ids": IDS}, False),
        ((2, 7), {"input_ids": IDS}, False),
        ((2, 1, 7), {"input_ids": IDS}, False),
        ((2, 4, 7), {"mask": np.ones((2, 4), np.int64)}, False),
    ],
    ids=["vocabulary", "mask", "states", "pooled", "last token", "no ids"],
)
def test_scores_have_an_element_for_every_token(shape, feed, expected):
    assert are_token_scores(np.zeros(shape, np.float32), feed, {"input_ids": 7}) == expected


def test_a_vocabulary_is_the_table_of_ids_and_not_that_of_positions_or_types():
    text = """g (int64[N,L] input_ids, int64[N,L] token_type_ids, int64[N,L] position_ids, int64[N,L] other)
        => (float[N,L,6] y) { a = Gather (words, input_ids) b = Gather (types, token_type_ids)
        c = Gather (places, position_ids) d = Add (a, b) y = Add (d, c) }"""
    proto = model(text, words=(20, 6), types=(2, 6), places=(8, 6))
    assert vocabularies(proto) == {"input_ids": 20}


def test_hidden_states_are_no_scores():
    proto, data = encoder(HIDDEN_STATES), texts(4)
    assert vocabularies(proto) == {"input_ids": WORDS}
    states = np.zeros((*data["input_ids"].shape, D), np.float32)
    assert not are_token_scores(states, data, vocabularies(proto))


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


@pytest.mark.filterwarnings("error")
def test_a_token_that_never_comes_raises_no_warning():
    scores = np.zeros((1, 2, 16), np.float32)
    scores[..., 0], scores[0, 1, 1] = 200, 199
    assert 0 < spread([log_shares(scores)]) < 1
