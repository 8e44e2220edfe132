"""Which folds, slices and ranks there are to choose from, and what they cost."""

from dataclasses import replace

import numpy as np
import pytest

from layers_alone import ALL, layer, recipe, use
from onnx_lowrank.allocate.cost import Linear, allowed, own_sizes, spared
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.macs import known_macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Between, Narrowing, Positions
from onnx_lowrank.core.option import Fold, Lowering, Option

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


@pytest.mark.parametrize(
    ("lowering", "encoder", "addends", "expected"),
    [
        (Lowering.NATIVE, "", (), (54, 8)),
        (Lowering.SHARED, "w", (), (54, 8)),
        (Lowering.SHARED, "v", (), (0, 8)),
        (Lowering.SUMMED, "", ("w", "v"), (54, 8)),
        (Lowering.SUMMED, "", ("v", "w"), (54, 0)),
    ],
)
def test_a_factor_that_layers_share_counts_once(lowering, encoder, addends, expected):
    of = layer(8, 6, (3, 3), addends=addends)
    assert own_sizes(of, Option(Fold.ENCODE, 1, 2, lowering, encoder)) == expected


@pytest.mark.parametrize(
    ("reads", "folds", "tables", "reason"),
    [
        ((False,), ALL, False, ""),
        ((True,), ALL, True, ""),
        ((False, True), ALL, False, "the recipe leaves tables as they are"),
        ((False,), (), True, "the recipe narrows pairs of layers only"),
        ((True,), (), False, "the recipe narrows pairs of layers only"),
    ],
)
def test_a_layer_that_the_recipe_spares_has_no_folds(reads, folds, tables, reason):
    uses = [replace(use("Gather" if is_read else "MatMul"), reads_indices=is_read) for is_read in reads]
    of, how = layer(8, 6, uses=uses), replace(recipe(folds), tables=tables)
    assert spared(of, how) == reason
    assert allowed(of, how) == ({} if reason else {Fold.ENCODE: (1, 2, 3, 6)})


def test_a_cost_has_to_be_below_that_of_the_kept_layers():
    tariff = PARAMS.tariff(layer(4, 5))
    assert tariff.keep == 20
    costs = np.array([19, 20, 21])
    assert tariff.is_cheaper(costs).tolist() == [True, False, False]
    assert tariff.is_cheaper(costs, 21).tolist() == [True, True, False]


def test_costs_of_a_lowering_of_several_layers_are_those_of_each_rank():
    of = layer(7, 12, added=3, siblings=("w", "v"))
    ranks = np.array([3, 6, 9, 15])
    found = PARAMS.tariff(of).together(Option(Fold.ENCODE, 1, 3, Lowering.SHARED, "w"), ranks)
    assert found.tolist() == [3 + 19 * j for j in (3, 6, 9, 15)]


def test_members_of_a_narrowing_cost_what_they_do_at_each_width():
    partner = replace(layer(12, 5), id="v", freed=4)
    of = layer(7, 12, freed=9, added=2, narrowing=Narrowing(Between.CHANNELS, (partner,), heads=3))
    first, own = PARAMS.tariff(of).members(np.array([0, 3, 6, 9]))
    # At width 0 they are as they were; a narrow layer has its new bias in place of what it frees.
    assert first.tolist() == [12 * 5 + 4, *(5 * width + 4 for width in (3, 6, 9))]
    assert own.tolist() == [7 * 12 + 9, *(7 * width + 2 for width in (3, 6, 9))]
    single = replace(of, narrowing=replace(of.narrowing, heads=1))
    assert PARAMS.tariff(single).members(np.array([0, 1]))[1].tolist() == [7 * 12 + 9, 7 + 2]
