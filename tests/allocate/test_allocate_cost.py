from dataclasses import replace
from math import prod

import numpy as np
import pytest

from evaluated import evaluated
from onnx_lowrank.allocate.cost import allowed, cost, dearest, linear, macs, parameters, running, total_macs
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.core.layer import Layer, Positions, ScopeWork, Use
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.plan import Aggregate, Budget
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import InputError

ALL = tuple(Fold)


def use(op="Conv", positions=None, transposed=False):
    return Use("", 0, "node", op, 1, transposed=transposed, positions=positions)


def layer(f, c, kernel=(), groups=1, uses=(), folds=None, slices=None, **fields):
    if folds is None:
        folds = ALL if prod(kernel) > 1 and len(kernel) == 2 else (Fold.ENCODE,)
    if slices is None:
        slices = tuple(k for k in range(1, c // groups + 1) if c // groups % k == 0)
    op = uses[0].op if uses else "Conv"
    return evaluated(Layer("w", op, f, c, kernel, groups, "float32", folds, slices, tuple(uses), **fields))


def recipe(folds=ALL, groups=None):
    return Recipe("test", "A test.", folds, groups, aggregate=Aggregate.MAX)


def factor_shapes(of, fold, k, j):
    """The shapes of `Factors`."""
    g, f, c, *_ = of.shape
    encoder, decoder = fold.kernels(of.kernel)
    return (g, k, j, c // k, *encoder), (g, f, k, j, *decoder)


@pytest.mark.parametrize("fold", ALL)
@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("j", [1, 2, 5])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kernel", [(3, 5), (1, 1), (5, 1), (2, 2)])
def test_parameters_are_the_sizes_of_the_factors(fold, k, j, groups, kernel):
    of = layer(8 * groups, 6 * groups, kernel, groups, folds=ALL, freed=7, added=11)
    encoder, decoder = factor_shapes(of, fold, k, j)
    assert parameters(of, Option(fold, k, j)) == prod(encoder) + prod(decoder) + 11
    assert parameters(of) == 8 * groups * 6 * prod(kernel) + 7
    slope, constant = linear(of, fold, k, Budget.PARAMS)
    assert slope * j + constant == parameters(of, Option(fold, k, j))
    assert constant == 11


# f, c = 8, 6, kernel 3×5 on 32×40 inputs, 16×20 outputs (stride 2), batch 2; j = 3.
CONV = {
    Fold.ENCODE: (16 * 20, 6 * 15, 8),
    Fold.ROWS: (32 * 20, 6 * 5, 8 * 3),
    Fold.COLS: (16 * 40, 6 * 3, 8 * 5),
    Fold.DECODE: (32 * 40, 6, 8 * 15),
}


@pytest.mark.parametrize("fold", ALL)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_macs_of_a_strided_conv(fold, k):
    of = layer(8, 6, (3, 5), uses=[use("Conv", Positions(2, (32, 40), (16, 20)))])
    positions, encoder, decoder = CONV[fold]
    assert macs(of, Option(fold, k, 3)) == 2 * 3 * (positions * encoder + 16 * 20 * k * decoder)
    assert macs(of) == 2 * 16 * 20 * 8 * 6 * 15


# The same transposed: 16×20 inputs become 32×40 outputs.
TRANSPOSED = {
    Fold.ENCODE: (6 * 15, 32 * 40, 8),
    Fold.ROWS: (6 * 5, 16 * 40, 8 * 3),
    Fold.COLS: (6 * 3, 32 * 20, 8 * 5),
    Fold.DECODE: (6, 16 * 20, 8 * 15),
}


@pytest.mark.parametrize("fold", ALL)
@pytest.mark.parametrize("k", [1, 2, 3])
def test_macs_of_a_strided_conv_transpose(fold, k):
    of = layer(8, 6, (3, 5), uses=[use("ConvTranspose", Positions(2, (16, 20), (32, 40)))])
    encoder, positions, decoder = TRANSPOSED[fold]
    assert macs(of, Option(fold, k, 3)) == 2 * 3 * (16 * 20 * encoder + positions * k * decoder)
    assert macs(of) == 2 * 16 * 20 * 8 * 6 * 15


@pytest.mark.parametrize("fold", [Fold.ENCODE, Fold.DECODE])
def test_a_strided_axis_of_size_one_is_evaluated_at_its_smaller_side(fold):
    down = layer(8, 6, (1, 1), folds=ALL, uses=[use("Conv", Positions(1, (32, 32), (16, 16)))])
    assert macs(down, Option(fold, 1, 2)) == 2 * 16 * 16 * (6 + 8)
    up = layer(8, 6, (1, 1), folds=ALL, uses=[use("ConvTranspose", Positions(1, (16, 16), (32, 32)))])
    assert macs(up, Option(fold, 1, 2)) == 2 * 16 * 16 * (6 + 8)


def test_macs_of_a_grouped_one_dimensional_conv():
    of = layer(8, 6, (5,), groups=2, folds=ALL, uses=[use("Conv", Positions(1, (100,), (50,)))])
    assert macs(of) == 50 * 8 * 3 * 5
    assert macs(of, Option(Fold.ENCODE, 3, 2)) == 50 * 2 * (6 * 5 + 3 * 8)
    assert macs(of, Option(Fold.DECODE, 3, 2)) == 2 * (100 * 6 + 50 * 3 * 8 * 5)


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
@pytest.mark.parametrize("transposed", [False, True])
def test_macs_of_a_matrix_count_rows(op, transposed):
    of = layer(8, 6, uses=[use(op, Positions(10), transposed)])
    assert macs(of) == 10 * 48
    assert macs(of, Option(Fold.ENCODE, 1, 2)) == 10 * 2 * 14


@pytest.mark.parametrize(("transposed", "width"), [(False, 8), (True, 6)])
def test_a_table_multiplies_only_the_factor_that_is_not_looked_up(transposed, width):
    of = layer(8, 6, uses=[use("Gather", Positions(10), transposed)])
    assert macs(of) == 0
    assert macs(of, Option(Fold.ENCODE, 1, 2)) == 10 * 2 * width


def test_parameters_count_once_and_macs_per_use():
    uses = [use("MatMul", Positions(10)), use("MatMul", Positions(7), transposed=True)]
    of = layer(8, 6, uses=uses)
    assert macs(of) == 17 * 48
    assert parameters(of) == 48
    tied = evaluated(replace(of, uses=(use("Gather", Positions(5)), uses[0])))
    assert macs(tied, Option(Fold.ENCODE, 1, 1)) == 5 * 8 + 10 * 14


def test_macs_are_unknown_where_one_use_is():
    of = layer(8, 6, uses=[use("MatMul", Positions(10)), use("MatMul")])
    assert macs(of) is None
    assert macs(of, Option(Fold.ENCODE, 1, 1)) is None
    assert cost(of, None, Budget.PARAMS) == 48
    for ask in (
        lambda: cost(of, None, Budget.MACS),
        lambda: Grid(Budget.MACS).ranks(of, Fold.ENCODE, 1),
        lambda: Grid(Budget.MACS).wanted_spectra(of, recipe()),
    ):
        with pytest.raises(InputError, match=r"^The MACs of layer 'w' are unknown .* --input-shape"):
            ask()


def test_integers_stay_exact_beyond_float64():
    of = layer(2**13, 2**13, (3, 3), uses=[use("Conv", Positions(2**10 + 1, (2047, 2047), (2047, 2047)))])
    assert macs(of) == (2**10 + 1) * 2047**2 * 2**26 * 9
    assert macs(of) > 2**53


@pytest.mark.parametrize("seed", range(60))
def test_largest_rank_is_the_last_that_is_cheaper(seed):
    rng = np.random.default_rng(seed)
    f, c = (int(n) for n in rng.integers(1, 25, 2))
    kernel = [(3, 3), (1, 1), (1, 5), (2, 4)][seed % 4]
    inputs, outputs = (17, 13), ((17, 13), (9, 7))[seed % 2]
    of = layer(f, c, kernel, uses=[use("Conv", Positions(1, inputs, outputs))], folds=ALL, added=seed % 3)
    for budget in Budget:
        for fold in ALL:
            for k in of.slices:
                ranks = range(1, of.full_rank(fold, k))
                cheaper = [j for j in ranks if cost(of, Option(fold, k, j), budget) < cost(of, None, budget)]
                assert cheaper == list(Grid(budget).ranks(of, fold, k))


def test_an_embedding_costs_no_macs_and_is_kept_under_them():
    of = layer(8, 600, uses=[use("Gather", Positions(10))], slices=(1,))
    assert Grid(Budget.MACS).wanted_spectra(of, recipe()) == {}
    assert Grid(Budget.PARAMS).wanted_spectra(of, recipe()) == {Fold.ENCODE: (1,)}


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
    assert Grid(Budget.PARAMS).wanted_spectra(of, recipe()) == {
        Fold.ENCODE: full,
        Fold.ROWS: full,
        Fold.COLS: full,
        Fold.DECODE: (1, 2, 3),
    }
    assert Grid(Budget.PARAMS).wanted_spectra(of, recipe((Fold.ENCODE,), (3,))) == {Fold.ENCODE: (1, 3)}


@pytest.mark.parametrize(("f", "c"), [(1, 600), (600, 1), (2, 2), (1, 1)])
def test_a_layer_that_cannot_become_cheaper_wants_nothing(f, c):
    assert Grid(Budget.PARAMS).wanted_spectra(layer(f, c), recipe()) == {}


def scopes(*unknown, calls=("function",)):
    """A model with an If whose branches cost 100 and 75, a Loop (5 of these) in the second; functions."""
    rows = [("", None, None, 1000), ("then", "", 4, 100), ("else", "", 4, 70), ("loop", "else", None, 5)]
    rows += [("function", None, None, 3), ("idle", None, None, 7)]
    made = [ScopeWork(path, *rest, None if path in unknown else n) for path, *rest, n in rows]
    return (replace(made[0], calls=calls), *made[1:])


def in_scope(*paths):
    return layer(8, 6, uses=[replace(use("MatMul", Positions(1)), scope=path) for path in paths])


@pytest.mark.parametrize(
    ("paths", "option", "expected"),
    [
        ((), None, 1103),
        (("",), None, 1103 + 48),
        (("",), Option(Fold.ENCODE, 1, 2), 1103 + 28),
        (("then",), None, 1103 + 48),
        (("else",), None, 1103 + 48 - 25),
        (("loop",), None, 1103 + 48 - 25),
        (("loop",), Option(Fold.ENCODE, 1, 1), 1103),
        (("then", "loop"), None, 1103 + 48),
        (("else", "loop", "function", ""), None, 1103 + 4 * 48 - 25),
        (("idle",), None, 1103),
    ],
)
def test_total_macs_count_the_dearer_branch_and_every_other_body_once(paths, option, expected):
    assert total_macs(scopes(), [(in_scope(*paths), option)]) == expected


@pytest.mark.parametrize("unknown", ["", "then", "else", "loop", "function"])
def test_total_macs_are_unknown_where_those_of_any_scope_are(unknown):
    assert total_macs(scopes(unknown), []) is None
    assert total_macs(scopes(), [(in_scope(unknown), None)]) is not None
    nowhere = layer(8, 6, uses=[replace(use("MatMul"), scope=unknown)])
    assert total_macs(scopes(), [(nowhere, None)]) is None


def test_a_function_that_nothing_calls_costs_nothing_even_unknown():
    nowhere = layer(8, 6, uses=[replace(use("MatMul"), scope="idle")])
    assert total_macs(scopes("idle"), [(nowhere, None)]) == 1103
    assert "idle" not in running(scopes())
    assert running(scopes()) == {"", "then", "else", "loop", "function"}


def test_a_function_counts_once_per_call_wherever_it_is_called():
    assert total_macs(scopes(calls=("function",) * 3), []) == 1100 + 9
    outer = [*scopes(calls=("idle", "idle"))]
    outer[-1] = replace(outer[-1], calls=("function", "function", "function"))
    assert total_macs(outer, []) == 1100 + 2 * (7 + 9)
    assert dearest(outer, [])[1] == {"": 1, "then": 1, "else": 0, "loop": 0, "function": 6, "idle": 2}
    branch = [*scopes(calls=())]
    branch[2] = replace(branch[2], calls=("function",) * 9)
    assert total_macs(branch, []) == 1000 + 70 + 5 + 27
    assert dearest(branch, [])[1]["else"] == 1


def test_functions_that_call_themselves_have_no_macs():
    loop = [*scopes(calls=("idle",))]
    loop[-1] = replace(loop[-1], calls=("idle",))
    assert total_macs(loop, []) is None


def test_the_dearest_route_goes_where_the_layers_are():
    heavy = layer(80, 6, uses=[replace(use("MatMul", Positions(1)), scope="loop")])
    assert dearest(scopes(), [(heavy, None)])[1]["loop"] == 1
    assert dearest(scopes(), [(heavy, Option(Fold.ENCODE, 1, 0))])[1]["loop"] == 0
