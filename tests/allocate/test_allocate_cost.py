"""Which folds, slices and ranks there are to choose from."""

import numpy as np
import pytest

from layers_alone import ALL, layer, recipe, use
from onnx_lowrank.allocate.cost import Linear, allowed
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.macs import known_macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Positions
from onnx_lowrank.core.option import Fold, Option

PARAMS = Linear(parameters)


@pytest.mark.parametrize("seed", range(60))
def test_largest_rank_is_the_last_that_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    f, c = (int(n) for n in rng.integers(1, 25, 2))
    kernel = [(3, 3), (1, 1), (1, 5), (2, 4)][seed % 4]
    inputs, outputs = (17, 13), ((17, 13), (9, 7))[seed % 2]
    of = layer(f, c, kernel, uses=[use("Conv", Positions(1, inputs, outputs))], folds=ALL, added=seed % 3)
    for cost in (parameters, known_macs):
        for fold in ALL:
            for k in of.slices:
                ranks = range(1, of.full_rank(fold, k))
                cheaper = [j for j in ranks if cost(of, Option(fold, k, j)) < cost(of, None)]
                assert cheaper == list(Grid(Linear(cost)).ranks(of, fold, k))


@pytest.mark.parametrize(
    ("kernel", "listed", "asked", "expected"),
    [
        ((3, 3), ALL, ALL, ALL),
        ((3, 3), ALL, (Fold.ROWS,), (Fold.ROWS,)),
        ((1, 1), (Fold.ENCODE,), (Fold.ROWS,), (Fold.ENCODE,)),
        ((1, 1), (Fold.ENCODE,), ALL, (Fold.ENCODE,)),
        ((5, 1), (Fold.ENCODE, Fold.DECODE), (Fold.ROWS,), (Fold.DECODE,)),
        ((1, 5), (Fold.ENCODE, Fold.DECODE), (Fold.ROWS,), (Fold.ENCODE,)),
        ((5, 1), (Fold.ENCODE, Fold.ROWS), (Fold.DECODE,), (Fold.ROWS,)),
        ((1, 5), (Fold.ENCODE, Fold.COLS), ALL, (Fold.ENCODE, Fold.COLS)),
        ((5, 1), (Fold.ENCODE, Fold.DECODE), (Fold.COLS,), (Fold.ENCODE,)),
        ((5, 1), (Fold.ENCODE, Fold.DECODE), ALL, (Fold.ENCODE, Fold.DECODE)),
        ((), (Fold.ENCODE,), (Fold.ROWS,), (Fold.ENCODE,)),
        ((), (Fold.ENCODE,), (Fold.DECODE,), (Fold.ENCODE,)),
        ((5,), (Fold.ENCODE, Fold.DECODE), (Fold.ROWS,), (Fold.ENCODE,)),
        ((5,), (Fold.ENCODE, Fold.DECODE), ALL, (Fold.ENCODE, Fold.DECODE)),
        ((3, 3, 3), (Fold.ENCODE, Fold.DECODE), (Fold.ROWS, Fold.COLS), (Fold.ENCODE,)),
        ((3, 3, 3), (Fold.ENCODE, Fold.DECODE), (Fold.ROWS, Fold.DECODE), (Fold.ENCODE, Fold.DECODE)),
        ((3, 3, 3), (Fold.ENCODE, Fold.DECODE), (Fold.DECODE,), (Fold.DECODE,)),
        ((3, 3), (Fold.ENCODE, Fold.DECODE), (Fold.ROWS,), (Fold.ENCODE,)),
    ],
)
def test_folds_that_coincide_stand_for_each_other(kernel, listed, asked, expected):
    of = layer(8, 6, kernel, folds=listed)
    assert tuple(allowed(of, recipe(asked))) == expected


@pytest.mark.parametrize(
    ("groups", "expected"), [(None, (1, 2, 3, 6)), ((1,), (1,)), ((2, 4, 6), (2, 6)), ((5,), None)]
)
def test_groups_are_those_that_recipe_and_layer_share(groups, expected):
    found = allowed(layer(8, 6, (3, 3)), recipe((Fold.ENCODE,), groups))
    assert found == ({} if expected is None else {Fold.ENCODE: expected})


def test_spectra_are_wanted_where_an_option_is_cheaper_and_of_one_slice_for_the_norm():
    # Rank 1 costs 6·9 + k·8 of 432: all k; decode costs 6 + k·72: only k below 6; rows 18 + k·24.
    of = layer(8, 6, (3, 3))
    full = (1, 2, 3, 6)
    assert Grid(PARAMS).wanted_spectra(of, recipe()) == {
        Fold.ENCODE: full,
        Fold.ROWS: full,
        Fold.COLS: full,
        Fold.DECODE: (1, 2, 3),
    }
    assert Grid(PARAMS).wanted_spectra(of, recipe((Fold.ENCODE,), (3,))) == {Fold.ENCODE: (1, 3)}


@pytest.mark.parametrize(("f", "c"), [(1, 600), (600, 1), (2, 2), (1, 1)])
def test_a_layer_that_cannot_become_cheaper_wants_nothing(f, c):
    assert Grid(PARAMS).wanted_spectra(layer(f, c), recipe()) == {}
