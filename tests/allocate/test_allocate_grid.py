"""Ranks in blocks."""

import numpy as np
import pytest

from onnx_lowrank.allocate.cost import Line, Linear
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import candidates, unscored
from onnx_lowrank.allocate.solve import solve
from onnx_lowrank.budgets.params import parameters
from onnx_lowrank.core.layer import Layer, Use
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError

PARAMS = Linear(parameters)
BLOCKS = (1, 2, 3, 4, 8, 16)
KS = (1, 2, 4, 8)


def layer(f=48, c=32, kernel=(3, 3), groups=1):
    op = "Conv" if kernel else "MatMul"
    return Layer(
        "w", op, f, c, kernel, groups, "float32", Fold.distinct(kernel), KS, (Use("", 0, "n", op, 1),)
    )


def recipe(aggregate=Aggregate.SUM):
    return Recipe("r", "For the tests.", tuple(Fold), None, aggregate=aggregate)


class Straight:
    """Costs of one line."""

    def __init__(self, keep, slope, constant):
        self._line = Line(keep, slope, constant)

    def line(self, of, fold, k):
        return self._line


@pytest.mark.parametrize(
    ("line", "ranks"),
    [
        ((10, 4, 5), [1]),
        ((10, 4, 6), []),
        ((10, 2, 3), [1, 2, 3]),
        ((1000, 1, 0), [1, 2, 3, 4]),  # below the full rank
        ((10, 0, 3), []),  # no rank is the last that is cheaper
        ((10, -1, 3), []),
        ((3, 1, 10), []),
    ],
)
def test_ranks_lie_below_the_full_one_and_cost_less_than_the_layer(line, ranks):
    assert list(Grid(Straight(*line)).ranks(layer(5, 8, ()), Fold.ENCODE, 1)) == ranks


def test_only_the_slices_of_convolutions_keep_to_blocks():
    costs = Straight(1000, 1, 0)
    convolution, matrix = layer(5, 6, (3, 3)), layer(5, 6, ())
    assert list(Grid(costs, 4).ranks(convolution, Fold.ENCODE, 1)) == [4]
    assert list(Grid(costs, 4).ranks(convolution, Fold.ENCODE, 2)) == []
    assert list(Grid(costs, 2).ranks(matrix, Fold.ENCODE, 2)) == [2]


def falling(of):
    """Errors that fall with the rank."""
    return {
        (fold, k): np.linspace(1, 0, of.full_rank(fold, k) + 1) ** 2 for fold in of.folds for k in of.slices
    }


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("k", KS)
@pytest.mark.parametrize("fold", Fold)
def test_ranks_are_those_multiples_that_are_cheaper(fold, k, block):
    of, grid = layer(), Grid(PARAMS, block)
    dense = parameters(of)
    cheaper = [j for j in range(1, of.full_rank(fold, k)) if parameters(of, Option(fold, k, j)) < dense]
    fits = k == 1 or (32 // k) % block == 0
    assert list(grid.ranks(of, fold, k)) == [j for j in cheaper if j % block == 0 and fits]


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_slices_of_matrices_may_have_any_width(kernel):
    ranks = Grid(PARAMS, 8).ranks(layer(f=96, c=48, kernel=kernel), Fold.ENCODE, 4)
    assert bool(ranks) == (kernel == ())
    assert all(j % 8 == 0 for j in ranks)


def test_the_channels_of_an_operators_own_groups_count():
    grid = Grid(PARAMS, 8)
    assert grid.ranks(layer(f=128, c=64, groups=2), Fold.ENCODE, 4)
    assert not grid.ranks(layer(f=128, c=64, groups=2), Fold.ENCODE, 8)


@pytest.mark.parametrize("block", BLOCKS)
def test_what_has_no_rank_in_blocks_is_kept_and_wants_no_spectra(block):
    of, grid = layer(f=9, c=4, kernel=(1, 1)), Grid(PARAMS, block)
    table = candidates(of, falling(of), recipe(), grid)
    assert bool(grid.wanted_spectra(of, recipe())) == (table.cost.size > 1) == (block <= 2)
    assert all(j % block == 0 for j in table.j)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("aggregate", Aggregate)
def test_plans_keep_to_the_blocks(aggregate, ratio, block):
    of, how = layer(), recipe(aggregate)
    tables = [candidates(of, falling(of), how, Grid(PARAMS, block))] * 2
    limit = int(ratio * sum(int(table.cost[0]) for table in tables))
    try:
        solution = solve(tables, Limits.single(tables, limit), how)
    except BudgetError:
        assert 2 * min(tables[0].cost) > limit or aggregate is Aggregate.UNIFORM
        return
    assert solution.cost <= limit
    assert all(table.j[pick] % block == 0 for table, pick in zip(tables, solution.picks, strict=True))


@pytest.mark.parametrize("block", BLOCKS)
def test_one_relative_rank_is_rounded_down_to_blocks(block):
    """The uniform rule over k = 1: ⌊ρ · full rank⌋ in whole blocks, at least one block."""
    layers = [layer(f=n, c=n, kernel=()) for n in (64, 128, 96)]
    how = Recipe("r", "For the tests.", (Fold.ENCODE,), (1,), aggregate=Aggregate.UNIFORM)
    tables = [candidates(of, falling(of), how, Grid(PARAMS, block)) for of in layers]
    total = sum(int(table.cost[0]) for table in tables)
    picks = solve(tables, Limits.single(tables, total // 2), how).picks
    ranks = [int(table.j[pick]) for table, pick in zip(tables, picks, strict=True)]
    sizes = np.array([64, 128, 96])
    fitting = [
        [max(block, int(rho * n) // block * block) for n in sizes]
        for rho in np.unique(np.concatenate([np.arange(n) / n for n in sizes]))
    ]
    cost_of = [sum(2 * n * j for n, j in zip(sizes, of, strict=True)) for of in fitting]
    assert ranks == [of for of, spent in zip(fitting, cost_of, strict=True) if spent <= total // 2][-1]


def test_a_smaller_block_never_reaches_less():
    of = layer()
    least = [int(unscored(of, recipe(), Grid(PARAMS, block)).cost.min()) for block in (16, 8, 4, 2, 1)]
    assert least == sorted(least, reverse=True)
