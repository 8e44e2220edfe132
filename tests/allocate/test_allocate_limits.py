"""Plans under two limits, and the plan that exceeds them least."""

import numpy as np
import pytest
import scipy

from onnx_lowrank.allocate import knapsack
from onnx_lowrank.allocate.knapsack import solve_knapsacks
from onnx_lowrank.allocate.limits import Limits, Single
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.solve import smallest, solve
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe


def recipe(aggregate):
    return Recipe("test", "A test.", tuple(Fold), None, aggregate=aggregate)


def table(costs, errors, price=None):
    """Candidates of keep, which comes first, and of options by ascending price."""
    n = len(costs)
    ints = [np.array([first, *[1] * (n - 1)]) for first in (-1, 0)]
    prices = None if price is None else np.array(price)
    full = np.full(n, n)
    return Candidates(
        "w", *ints, np.arange(n), full, np.array(costs), np.array(errors, float), price=prices
    )  # fmt: skip


TWO = [table([10, 2, 6], [0, 0.75, 0.25]), table([10, 2, 6], [0, 0.5, 0.125])]
COSTS = (np.array([[10, 2, 6], [10, 2, 6]]), np.array([[10, 2, 6], [0, 0, 0]]))
"""Only the first layer costs anything under the second limit."""


def test_spare_and_excess_are_those_of_every_limit():
    limits = Limits(np.array([13, 5]), COSTS)
    assert limits.spare((2, 1)).tolist() == [5, -1]
    assert limits.excess((2, 1)) == 1
    assert limits.excess((1, 2)) == -3
    assert limits.excess((1, 0)) == -1
    assert limits.budgets.tolist() == [13, 5], "they are as they were"


def test_one_budget_is_one_limit_that_no_other_follows():
    limits = Limits.single(TWO, 12)
    assert limits.alike
    assert limits.spare((1, 2)).tolist() == [4]
    assert Single(limits).further(()) is None


@pytest.mark.parametrize("aggregate", [Aggregate.MAX, Aggregate.SUM])
def test_the_second_of_two_limits_counts(aggregate):
    # Without it, the first layer would take its option of cost 6.
    solution = solve(TWO, Limits(np.array([12, 5]), COSTS), recipe(aggregate))
    assert (solution.picks, solution.gap) == ((1, 0), 0)
    assert solve(TWO, Limits(np.array([12, 6]), COSTS), recipe(aggregate)).picks == (2, 2)


@pytest.mark.parametrize(
    ("aggregate", "gap"),
    [(Aggregate.MAX, 1), (Aggregate.SUM, 1), (Aggregate.RATIO, None), (Aggregate.UNIFORM, None)],
)
def test_the_smallest_plan_proves_nothing(aggregate, gap):
    assert smallest(TWO, Limits.single(TWO, 0), recipe(aggregate)).gap == gap


def test_of_plans_that_exceed_a_limit_alike_the_one_of_less_error_is_the_smallest():
    # Both options cost 5; the price of the second is higher, and its error lower.
    priced = [table([10, 5, 5], [0, 0.5, 0.125], price=[10, 3, 6])]
    solution = smallest(priced, Limits.single(priced, 1), recipe(Aggregate.SUM))
    assert (solution.picks, solution.gap) == ((2,), None)


def test_a_layer_whose_costs_differ_by_one_has_a_choice():
    of = [table([2, 1], [0, 0.5])]
    assert solve(of, Limits.single(of, 1), recipe(Aggregate.SUM)).picks == (1,)
    assert solve(of, Limits(np.array([0]), (np.array([[0, 0]]),)), recipe(Aggregate.SUM)).picks == (0,)


def test_a_price_rises_until_every_limit_holds():
    priced = [table([10, 2, 6], [0, 0.75, 0.25], price=[10, 2, 6]) for _ in range(2)]
    # The first limit holds from the start; the second asks for the cheapest option of the first layer.
    solution = solve(priced, Limits(np.array([20, 5]), COSTS), recipe(Aggregate.SUM))
    assert (solution.picks, solution.gap) == ((1, 2), None)
    assert smallest(priced, Limits(np.array([0, 0]), COSTS), recipe(Aggregate.SUM)).picks == (1, 1)


def test_without_a_linear_relaxation_the_optimum_is_found_all_the_same(monkeypatch):
    values = [np.array([0, 0.75, 0.25]), np.array([0, 0.5, 0.125])]
    assert solve_knapsacks(COSTS, values, np.array([12, 5])) == ([1, 0], 0)
    failed = scipy.optimize.OptimizeResult(success=False)
    monkeypatch.setattr(scipy.optimize, "linprog", lambda *_, **__: failed)
    assert solve_knapsacks(COSTS, values, np.array([12, 5])) == ([1, 0], 0)


def test_the_gap_is_what_the_best_bound_leaves(monkeypatch):
    values = [np.array([0, 0.75, 0.25]), np.array([0, 0.5, 0.125])]
    monkeypatch.setattr(knapsack, "_branch_and_cut", lambda *_: ([], 0.5625))
    picks, gap = solve_knapsacks(COSTS, values, np.array([12, 5]), most_states=0)
    assert gap == 1 - 0.5625 / (values[0][picks[0]] + values[1][picks[1]])


def test_items_that_the_relaxation_mixes_need_not_fit_alone():
    # Half of the second and half of the third meet both budgets at the value 0; only the first fits alone.
    costs, values = [np.array([[1, 5, 0], [1, 0, 4]])], [np.array([8.0, 0.0, 0.0])]
    assert solve_knapsacks(costs, values, np.array([3, 2])) == ([0], 0)
