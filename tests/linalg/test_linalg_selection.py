"""Channels to keep: exact errors, refits and planted redundancy, against float64 least squares."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.core.factors import Moments
from onnx_lowrank.core.option import Fold
from onnx_lowrank.linalg import selection
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import error, of_weight


def moments(x):
    """Moments of rows, shape (n, p)."""
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean[None], (centred.T @ centred / len(x))[None])


def fitted_to(quadratic, shape, width):
    """The factors of the most worthy channels."""
    return selection.fit(quadratic, shape, selection.order(quadratic, shape[2])[:width])


def problem(weight, x, centred=True):
    return of_weight(weight, moments(x), centred=centred, ridge=1e-7)


def correlated(rng, n, c, size, rank):
    """Rows whose channels of `size` elements are mixtures of `rank` sources."""
    return rng.standard_normal((n, rank)) @ rng.standard_normal((rank, c * size))


@pytest.mark.parametrize("kernel", [(), (3,), (2, 2)])
@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_refit_is_least_squares_on_the_kept_channels(kernel, width):
    rng = np.random.default_rng(width)
    c, size = 7, int(np.prod(kernel))
    weight = rng.standard_normal((1, 5, c, *kernel))
    x = rng.standard_normal((400, c * size)) @ rng.standard_normal((c * size, c * size))
    factors = fitted_to(problem(weight, x), weight.shape, width)
    kept = selection.selected(factors)
    assert kept.tolist() == sorted(set(kept.tolist()))
    rows = (x - x.mean(axis=0)).reshape(-1, c, size)[:, kept].reshape(len(x), -1)
    target = (x - x.mean(axis=0)) @ weight.reshape(5, -1).T
    best = np.linalg.lstsq(rows, target, rcond=None)[0].T
    np.testing.assert_allclose(factors.decoder.reshape(5, -1), best, rtol=1e-5, atol=1e-6)
    dense = compose(factors).reshape(5, c, -1)
    assert factors.fold is Fold.DECODE.on(kernel)
    assert not np.delete(dense, kept, axis=1).any()
    np.testing.assert_allclose(dense[:, kept].reshape(5, -1), best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [(), (3,)])
@pytest.mark.parametrize("centred", [True, False])
def test_the_errors_of_all_widths_are_those_of_the_fits(kernel, centred):
    rng = np.random.default_rng(7)
    c, size = 12, int(np.prod(kernel))
    weight = rng.standard_normal((1, 4, c, *kernel))
    quadratic = problem(weight, 1 + rng.standard_normal((300, c * size)), centred)
    curve = selection.errors(quadratic, selection.order(quadratic, c))
    assert curve[0] == 1
    assert (np.diff(curve) <= 0).all()
    for width in range(1, c + 1):
        made = error(quadratic, compose(fitted_to(quadratic, weight.shape, width)))
        assert curve[width] == pytest.approx(made, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("size", [1, 4])
def test_channels_that_others_explain_go_first(size):
    rng = np.random.default_rng(3)
    free = rng.standard_normal((500, 6 * size))
    copies = free[:, : 3 * size] * 2 + 1e-4 * rng.standard_normal((500, 3 * size))
    x = np.concatenate([free, copies], axis=1)
    weight = rng.standard_normal((1, 5, 9, *((size,) if size > 1 else ())))
    quadratic = problem(weight, x)
    curve = selection.errors(quadratic, selection.order(quadratic, 9))
    assert curve[6] < 1e-6
    assert curve[5] > 1e-2


def test_unread_channels_go_before_read_ones():
    rng = np.random.default_rng(5)
    weight = rng.standard_normal((1, 3, 20))
    silent = [1, 4, 17]
    weight[:, :, silent] = 0
    quadratic = problem(weight, rng.standard_normal((900, 20)))
    assert set(selection.order(quadratic, 20)[-3:].tolist()) == set(silent)


def test_the_order_is_a_permutation_for_every_number_of_channels():
    rng = np.random.default_rng(9)
    for c in (1, 2, 3, 17, 33, 100):
        quadratic = problem(rng.standard_normal((1, 2, c)), rng.standard_normal((300, c)))
        assert sorted(selection.order(quadratic, c).tolist()) == list(range(c))


def naive(quadratic, channels):
    """One channel at a time, with an inverse of its own for each."""
    blocks = np.arange(quadratic.second.shape[1]).reshape(channels, -1)
    left, dropped = list(range(channels)), []
    while len(left) > 1:
        growth = []
        for channel in left:
            rest = blocks[[other for other in left if other != channel]].reshape(-1)
            x = quadratic.cross[0][:, rest]
            growth.append(-np.trace(x @ np.linalg.solve(quadratic.second[0][np.ix_(rest, rest)], x.T)))
        dropped.append(left.pop(int(np.argmin(growth))))
    return [*left, *reversed(dropped)]


@pytest.mark.parametrize(("c", "kernel"), [(9, ()), (70, ()), (6, (3,)), (5, (2, 2))])
def test_the_order_is_that_of_single_removals(monkeypatch, c, kernel):
    rng = np.random.default_rng(c)
    size = int(np.prod(kernel))
    x = correlated(rng, 600, c, size, 2 * c) + 0.1 * rng.standard_normal((600, c * size))
    quadratic = problem(rng.standard_normal((1, 8, c, *kernel)), x)
    expected = naive(quadratic, c)
    for block in (1, 4, 64):
        monkeypatch.setattr(selection, "_BLOCK", block)
        assert selection.order(quadratic, c).tolist() == expected


def test_outputs_without_power_have_no_error():
    weight = np.zeros((1, 3, 5))
    quadratic = problem(weight, np.random.default_rng(1).standard_normal((50, 5)))
    assert not selection.errors(quadratic, np.arange(5)).any()


@pytest.mark.parametrize("size", [1, 3])
def test_held_out_inputs_scale_the_curve(size):
    rng = np.random.default_rng(13)
    c = 24
    weight = rng.standard_normal((1, 6, c, *((size,) if size > 1 else ())))
    mix = rng.standard_normal((c * size, c * size))
    fitted, held = (problem(weight, rng.standard_normal((n, c * size)) @ mix) for n in (150, 2000))
    kept = selection.order(fitted, c)
    plain, judged = selection.errors(fitted, kept), selection.errors(fitted, kept, held)
    for width in (1, 4, 7, 10, 13, 16, 19, 22):
        # The refits at these widths are the judged ones.
        weight_at = compose(fitted_to(fitted, weight.shape, width))
        assert judged[width] == pytest.approx(min(error(held, weight_at), judged[width - 1]), rel=0.25)
    assert judged[10] > plain[10]
    assert (np.diff(judged) <= 0).all()
    assert (judged[0], judged[-1]) == (1.0, pytest.approx(0.0, abs=1e-6))


def test_the_inverse_is_symmetric_and_exact():
    root = np.random.default_rng(3).standard_normal((20, 30))
    second = root @ root.T
    inverse = selection._inverse(second)
    np.testing.assert_array_equal(inverse, inverse.T)
    np.testing.assert_allclose(inverse @ second, np.eye(20), atol=1e-11)


def test_an_indefinite_matrix_has_its_inverse_too():
    np.testing.assert_allclose(selection._inverse(np.diag([2.0, -4.0])), np.diag([0.5, -0.25]))
