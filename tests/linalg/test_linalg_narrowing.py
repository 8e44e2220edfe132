"""Smaller heads: the errors of all sizes, optimal subspaces and planted ranks, against float64 references."""

from __future__ import annotations

import numpy as np
import pytest

from onnx_lowrank.core.factors import Moments
from onnx_lowrank.core.layer import Rows
from onnx_lowrank.linalg import narrowing
from onnx_lowrank.linalg.folding import compose
from onnx_lowrank.linalg.quadratic import error, of_weight

SIZE = 5


def moments(x):
    """Moments of rows, shape (n, p)."""
    mean = x.mean(axis=0)
    centred = x - mean
    return Moments(len(x), mean[None], (centred.T @ centred / len(x))[None])


def problem(weight, x, ridge=1e-9):
    return of_weight(weight, moments(x), centred=True, ridge=ridge)


def mixed(rng, n, size):
    """Rows whose elements are correlated, with a mean."""
    return (rng.standard_normal((n, size)) + 0.5) @ rng.standard_normal((size, size))


def block_diagonal(matrix, heads):
    return all(
        not block.any()
        for row, parts in enumerate(np.split(matrix, heads, axis=0))
        for column, block in enumerate(np.split(parts, heads, axis=1))
        if row != column
    )


def refit(weight, x, encoder):
    """The least error of W ≈ D E for a given encoder E, relative to that of W ≈ 0."""
    centred = x - x.mean(axis=0)
    target = centred @ weight[0].T
    given = centred @ encoder.T
    solution = np.linalg.lstsq(given, target, rcond=None)[0]
    return np.sum((target - given @ solution) ** 2) / np.sum(target**2)


@pytest.mark.parametrize(("heads", "shared"), [(3, 1), (1, 1), (2, 3)])
def test_the_errors_of_values_are_those_of_the_refits(heads, shared):
    rng = np.random.default_rng(heads)
    number = heads * shared
    weight = rng.standard_normal((1, 7, number * SIZE))
    x = mixed(rng, 500, number * SIZE)
    quadratic = problem(weight, x)
    way = narrowing.values(quadratic, heads, shared)
    curve = way.errors(quadratic)
    assert curve.shape == (number * SIZE + 1,)
    assert curve[0] == 1
    assert curve[-1] == pytest.approx(0, abs=1e-9)
    assert (np.diff(curve) <= 0).all()
    for size in range(1, SIZE + 1):
        width = number * size
        factors = way.fit(quadratic, weight.shape, width)
        encoder = factors.encoder.reshape(width, -1)
        assert block_diagonal(encoder, number)
        for head in range(number):
            own = encoder[head * size : (head + 1) * size, head * SIZE : (head + 1) * SIZE]
            first = head // shared * shared
            other = encoder[first * size : (first + 1) * size, first * SIZE : (first + 1) * SIZE]
            np.testing.assert_array_equal(own, other)
            np.testing.assert_allclose(own @ own.T, np.eye(size), atol=1e-12)
        assert curve[width] == pytest.approx(error(quadratic, compose(factors)), abs=1e-9)
        assert curve[width] == pytest.approx(refit(weight, x, encoder), abs=1e-6)
    # Widths between two sizes have the error of the smaller one.
    np.testing.assert_array_equal(curve[:-1], np.repeat(curve[:-1:number], number))


def test_one_head_gets_the_best_factors_of_its_rank():
    rng = np.random.default_rng(5)
    weight, x = rng.standard_normal((1, 9, SIZE)), mixed(rng, 300, SIZE)
    quadratic = problem(weight, x)
    curve = narrowing.values(quadratic, 1, 1).errors(quadratic)
    outputs = (x - x.mean(axis=0)) @ weight[0].T
    spectrum = np.linalg.svd(outputs, compute_uv=False) ** 2
    best = 1 - np.append(0, np.cumsum(spectrum[:SIZE])) / spectrum.sum()
    np.testing.assert_allclose(curve, best, atol=1e-7)


def test_no_direction_of_one_head_costs_less_where_the_others_are_refitted():
    rng = np.random.default_rng(6)
    weight, x = rng.standard_normal((1, 6, 2 * SIZE)), mixed(rng, 400, 2 * SIZE)
    quadratic = problem(weight, x)
    basis = narrowing.values(quadratic, 2, 1).basis[0]

    def lost(columns):
        encoder = np.zeros((SIZE - 1 + SIZE, 2 * SIZE))
        encoder[: SIZE - 1, :SIZE] = columns.T
        encoder[SIZE - 1 :, SIZE:] = np.eye(SIZE)
        return refit(weight, x, encoder)

    found = lost(basis[:, : SIZE - 1])
    others = (np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0][:, : SIZE - 1] for _ in range(200))
    near = (np.linalg.qr(basis[:, :-1] + 0.05 * rng.standard_normal((SIZE, SIZE - 1)))[0] for _ in range(200))
    assert found <= min(map(lost, [*others, *near])) + 1e-9


@pytest.mark.parametrize("shared", [1, 2])
def test_planted_values_lose_nothing_at_their_rank(shared):
    rng = np.random.default_rng(8)
    heads, rank = 3, 2
    maps = [rng.standard_normal((rank, SIZE)) for _ in range(heads)]
    parts = [rng.standard_normal((600, rank)) @ maps[n // shared] for n in range(heads * shared)]
    weight = rng.standard_normal((1, 8, heads * shared * SIZE))
    x = np.concatenate(parts, axis=1)
    quadratic, exact = problem(weight, x, 1e-6), problem(weight, x, 0.0)
    way = narrowing.values(quadratic, heads, shared)
    curve = way.errors(quadratic, exact)
    width = heads * shared * rank
    # The ridge of 1e-6 keeps it from zero.
    assert curve[width] < 1e-6
    assert curve[width - 1] > 1e-2
    assert error(exact, compose(way.fit(quadratic, weight.shape, width))) < 1e-6


def drawn(rng, heads, shared, n=40):
    """Queries (heads · shared, n, d) and keys (heads, n, d)."""
    queries = np.stack([mixed(rng, n, SIZE) for _ in range(heads * shared)])
    return queries, np.stack([mixed(rng, n, SIZE) for _ in range(heads)])


def seconds(rows):
    return rows.swapaxes(1, 2) @ rows / rows.shape[1]


@pytest.mark.parametrize(("heads", "shared"), [(3, 1), (2, 2)])
def test_the_errors_of_scores_are_those_of_all_products(heads, shared):
    rng = np.random.default_rng(9)
    queries, keys = drawn(rng, heads, shared)
    way = narrowing.scores(seconds(queries), seconds(keys))
    others = drawn(rng, heads, shared)
    for first, second in ((queries, keys), others):
        curve = way.errors(seconds(first), seconds(second))
        whole = [q @ second[n // shared].T for n, q in enumerate(first)]
        errors = [1.0]
        for size in range(1, SIZE + 1):
            lost = 0.0
            for n, q in enumerate(first):
                into, out = (part[n // shared][:, :size] for part in (way.queries, way.keys))
                lost += np.sum((whole[n] - (q @ into) @ (second[n // shared] @ out).T) ** 2)
            errors.append(lost / sum(np.sum(w**2) for w in whole))
        expected = np.minimum.accumulate(np.minimum(errors, 1.0))
        np.testing.assert_allclose(curve[:: heads * shared], expected, atol=1e-10)


def test_no_factors_of_scores_lose_less():
    """Eckart and Young: with orthonormal roots of the moments, the singular values tell the least error."""
    rng = np.random.default_rng(10)
    queries, keys = drawn(rng, 1, 1)
    way = narrowing.scores(seconds(queries), seconds(keys))
    curve = way.errors(seconds(queries), seconds(keys))
    spectrum = np.linalg.svd(queries[0] @ keys[0].T, compute_uv=False) ** 2
    best = 1 - np.append(0, np.cumsum(spectrum[:SIZE])) / spectrum.sum()
    np.testing.assert_allclose(curve, best, atol=1e-10)


@pytest.mark.parametrize(("heads", "shared"), [(3, 1), (2, 2)])
def test_queries_and_their_bias_are_projected_alike(heads, shared):
    rng = np.random.default_rng(11)
    number, c, n = heads * shared, 12, 400
    weight, added = rng.standard_normal((number * SIZE, c)), rng.standard_normal(number * SIZE)
    x, keys = mixed(rng, n, c), np.stack([mixed(rng, n, SIZE) for _ in range(heads)])
    queries = (x @ weight.T + added).reshape(n, number, SIZE).swapaxes(0, 1)
    second = moments(x)
    mean = weight @ second.mean[0] + added
    found = narrowing.head_moments(weight, second.second[0], number, mean)
    np.testing.assert_allclose(found, seconds(queries), rtol=1e-10)
    centred = narrowing.head_moments(weight, second.second[0], number)
    np.testing.assert_allclose(centred, seconds(queries - queries.mean(axis=1, keepdims=True)), rtol=1e-9)
    way = narrowing.scores(found, seconds(keys), added)
    quadratic = of_weight(weight[None], second, centred=True, ridge=0.0)
    for size in (2, SIZE):
        width = number * size
        factors = way.fit(quadratic, (1, *weight.shape), width)
        assert block_diagonal(factors.decoder.reshape(number * SIZE, width), number)
        narrow = x @ compose(factors).reshape(weight.shape).T + added + way.shift(width)
        parts = narrow.reshape(n, number, SIZE).swapaxes(0, 1)
        expected = [
            q @ way.queries[m // shared][:, :size] @ way.keys[m // shared][:, :size].T
            for m, q in enumerate(queries)
        ]
        np.testing.assert_allclose(parts, expected, rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(parts, queries, rtol=1e-7, atol=1e-7)


def test_planted_scores_lose_nothing_at_their_rank():
    rng = np.random.default_rng(12)
    queries, keys = drawn(rng, 2, 1)
    queries = queries @ rng.standard_normal((2, SIZE, 2)) @ rng.standard_normal((2, 2, SIZE))
    way = narrowing.scores(seconds(queries), seconds(keys))
    curve = way.errors(seconds(queries), seconds(keys))
    assert curve[4] < 1e-8
    assert curve[3] > 1e-3
    assert np.isfinite(way.queries).all()
    assert np.isfinite(way.keys).all()


def test_silent_heads_have_no_error():
    silent = np.zeros((2, SIZE, SIZE))
    way = narrowing.scores(silent, silent)
    assert not way.errors(silent, silent).any()
    assert np.isfinite(way.queries).all()
    assert np.isfinite(way.keys).all()


@pytest.mark.parametrize(("heads", "shared"), [(1, 1), (3, 1), (2, 2)])
@pytest.mark.parametrize("width", [1, 3, SIZE])
def test_a_packed_matrix_gives_the_scores_of_its_narrow_rows(heads, shared, width):
    """The products of the features that the factors give are those of the encoder's rows, in float64."""
    rng = np.random.default_rng(8)
    many, few, c = heads * shared * SIZE, heads * SIZE, 11
    # The keys come first, and other features lie between and behind.
    keys, queries, f = Rows(2, few), Rows(few + 4, many), few + many + 7
    weight, x = rng.standard_normal((1, f, c)), rng.standard_normal((200, c))
    added = rng.standard_normal(f)
    taken = (slice(each.start, each.start + each.size) for each in (queries, keys))
    rows = [(x @ weight[0].T + added)[:, part] for part in taken]
    split = [each.reshape(len(x), -1, SIZE).swapaxes(0, 1) for each in rows]
    found = narrowing.scores(seconds(split[0]), seconds(split[1]))
    way = narrowing.PackedScores(found, (queries, keys), added)
    total = width * heads * shared
    factors = way.fit(problem(weight, x), weight.shape, total)
    small = width * heads
    narrow = factors.encoder.reshape(f - few - many + small + total, c) @ x.T
    first, second = slice(2, 2 + small), slice(2 + small + 2, 2 + small + 2 + total)
    whole = compose(factors)[0] @ x.T
    for head in range(heads * shared):
        size = slice(head * SIZE, (head + 1) * SIZE)
        few_size = slice(head // shared * SIZE, (head // shared + 1) * SIZE)
        given = whole[queries.start :][: queries.size][size].T @ whole[keys.start :][: keys.size][few_size]
        own = narrow[second][head * width : (head + 1) * width]
        met = narrow[first][head // shared * width : (head // shared + 1) * width]
        np.testing.assert_allclose(own.T @ met, given, rtol=1e-7, atol=1e-7)
    rest = np.ones(f, bool)
    for each in (queries, keys):
        rest[each.start : each.start + each.size] = False
    np.testing.assert_allclose(compose(factors)[0][rest], weight[0][rest], atol=1e-7)
    np.testing.assert_allclose((added + way.shift(total))[rest], added[rest])
    if width == SIZE:
        np.testing.assert_allclose(compose(factors), weight, atol=1e-6)
        np.testing.assert_allclose(way.shift(total), 0, atol=1e-8)
