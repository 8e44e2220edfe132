"""Multiply-accumulates against numbers computed by hand."""

from dataclasses import replace

import pytest

from evaluated import evaluated
from layers_alone import ALL, layer, recipe, use
from onnx_lowrank.allocate.cost import Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets.macs import dearest_macs, known_macs, macs
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Positions, ScopeWork
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.routes import running
from onnx_lowrank.errors import InputError

MACS, PARAMS = Linear(known_macs), Linear(parameters)


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
    assert parameters(of) == 48
    for ask in (
        lambda: known_macs(of),
        lambda: Grid(MACS).ranks(of, Fold.ENCODE, 1),
        lambda: Grid(MACS).wanted_spectra(of, recipe()),
    ):
        with pytest.raises(InputError, match=r"^The MACs of layer 'w' are unknown .* --input-shape"):
            ask()


def test_integers_stay_exact_beyond_float64():
    of = layer(2**13, 2**13, (3, 3), uses=[use("Conv", Positions(2**10 + 1, (2047, 2047), (2047, 2047)))])
    assert macs(of) == (2**10 + 1) * 2047**2 * 2**26 * 9
    assert macs(of) > 2**53


def test_an_embedding_costs_no_macs_and_is_kept_under_them():
    of = layer(8, 600, uses=[use("Gather", Positions(10))], slices=(1,))
    assert Grid(MACS).wanted_spectra(of, recipe()) == {}
    assert Grid(PARAMS).wanted_spectra(of, recipe()) == {Fold.ENCODE: (1,)}


def total(scopes, layers):
    return dearest_macs(scopes, layers)[0]


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
    assert total(scopes(), [(in_scope(*paths), option)]) == expected


@pytest.mark.parametrize("unknown", ["", "then", "else", "loop", "function"])
def test_total_macs_are_unknown_where_those_of_any_scope_are(unknown):
    assert total(scopes(unknown), []) is None
    assert total(scopes(), [(in_scope(unknown), None)]) is not None
    nowhere = layer(8, 6, uses=[replace(use("MatMul"), scope=unknown)])
    assert total(scopes(), [(nowhere, None)]) is None


def test_a_function_that_nothing_calls_costs_nothing_even_unknown():
    nowhere = layer(8, 6, uses=[replace(use("MatMul"), scope="idle")])
    assert total(scopes("idle"), [(nowhere, None)]) == 1103
    assert running(scopes()) == {"", "then", "else", "loop", "function"}


def test_a_function_counts_once_per_call_wherever_it_is_called():
    assert total(scopes(calls=("function",) * 3), []) == 1100 + 9
    outer = [*scopes(calls=("idle", "idle"))]
    outer[-1] = replace(outer[-1], calls=("function", "function", "function"))
    assert total(outer, []) == 1100 + 2 * (7 + 9)
    assert dearest_macs(outer, [])[1] == {"": 1, "then": 1, "else": 0, "loop": 0, "function": 6, "idle": 2}
    branch = [*scopes(calls=())]
    branch[2] = replace(branch[2], calls=("function",) * 9)
    assert total(branch, []) == 1000 + 70 + 5 + 27
    assert dearest_macs(branch, [])[1]["else"] == 1


def test_functions_that_call_themselves_have_no_macs():
    loop = [*scopes(calls=("idle",))]
    loop[-1] = replace(loop[-1], calls=("idle",))
    assert total(loop, []) is None


def test_the_dearest_route_goes_where_the_layers_are():
    heavy = layer(80, 6, uses=[replace(use("MatMul", Positions(1)), scope="loop")])
    assert dearest_macs(scopes(), [(heavy, None)])[1]["loop"] == 1
    assert dearest_macs(scopes(), [(heavy, Option(Fold.ENCODE, 1, 0))])[1]["loop"] == 0
