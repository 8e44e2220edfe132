from fractions import Fraction
from itertools import product
from math import fsum

import numpy as np
import pytest

from onnx_lowrank.allocate import knapsack
from onnx_lowrank.allocate import solve as solver
from onnx_lowrank.allocate.knapsack import Front, lower_hull, solve_knapsack, solve_knapsacks
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError


def recipe(aggregate, power=1.0):
    return Recipe("test", "A test.", tuple(Fold), None, aggregate=aggregate, power=float(power))


def solve(tables, budget, how):
    return solver.solve(tables, Limits.single(tables, budget), how)


def smallest(tables, how):
    return solver.smallest(tables, Limits.single(tables, 0), how).cost


def table(kept, options, price=None):
    """Candidates of keep and of options (cost, error) by ascending cost."""
    n = len(options)
    ints = [np.array([first, *[1] * n]) for first in (-1, 0)]
    return Candidates(
        layer="w",
        fold=ints[0],
        k=ints[1],
        j=np.arange(n + 1),
        full=np.array([0, *[n + 1] * n]),
        cost=np.array([kept, *(cost for cost, _ in options)], dtype=np.int64),
        error=np.array([0.0, *(error for _, error in options)]),
        price=None if price is None else np.array(price, dtype=np.int64),
    )


def random_table(rng, most=6, grain=None):
    """A random front; `grain` makes errors multiples of 1/grain, so that layers tie."""
    n = int(rng.integers(0, most + 1))
    costs = np.sort(rng.choice(np.arange(1, 40), n, replace=False))
    errors = (
        rng.choice(np.arange(1, grain + 1), min(n, grain), replace=False) / grain if grain else rng.random(n)
    )
    return table(int(rng.integers(40, 60)), list(zip(costs.tolist(), -np.sort(-errors), strict=False)))


def instance(seed, grain=None):
    rng = np.random.default_rng(seed)
    tables = [random_table(rng, grain=grain) for _ in range(rng.integers(1, 6))]
    low, high = (sum(int(reduce(t.cost)) for t in tables) for reduce in (np.min, np.max))
    return tables, int(rng.integers(low, high + 1))


def every_plan(tables, budget):
    """All plans within the budget: (picks, cost, errors)."""
    for picks in product(*(range(t.cost.size) for t in tables)):
        cost = sum(int(t.cost[n]) for t, n in zip(tables, picks, strict=True))
        if cost <= budget:
            yield picks, cost, [float(t.error[n]) for t, n in zip(tables, picks, strict=True)]


def check(solution, tables, budget):
    pairs = list(zip(tables, solution.picks, strict=True))
    assert solution.cost == sum(int(t.cost[n]) for t, n in pairs) <= budget
    return [float(t.error[n]) for t, n in pairs]


@pytest.mark.parametrize("seed", range(150))
def test_max_is_the_lexicographic_optimum(seed):
    tables, budget = instance(seed)
    solution = solve(tables, budget, recipe(Aggregate.MAX))
    errors = check(solution, tables, budget)
    best = min(sorted(other, reverse=True) for _, _, other in every_plan(tables, budget))
    assert sorted(errors, reverse=True) == best
    assert solution.objective == best[0]
    assert solution.gap == 0


@pytest.mark.parametrize("seed", range(100))
def test_max_leaves_as_few_ties_at_the_largest_error_as_possible(seed):
    tables, budget = instance(seed, grain=4)
    solution = solve(tables, budget, recipe(Aggregate.MAX))
    errors = check(solution, tables, budget)
    best = min((max(e), e.count(max(e))) for _, _, e in every_plan(tables, budget))
    assert (solution.objective, errors.count(solution.objective)) == best


@pytest.mark.parametrize("seed", range(60))
def test_max_cannot_improve_a_single_layer(seed):
    tables, budget = instance(seed, grain=3)
    solution = solve(tables, budget, recipe(Aggregate.MAX))
    check(solution, tables, budget)
    for t, pick in zip(tables, solution.picks, strict=True):
        better = t.cost[t.error < t.error[pick]]
        assert not (solution.cost - t.cost[pick] + better <= budget).any()


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize("seed", range(80))
def test_sum_is_the_optimum_at_the_lowest_cost(seed, power):
    grain = (None, 8)[seed % 2]  # eighths: sums are exact, and many plans tie
    tables, budget = instance(1000 + seed, grain)
    solution = solve(tables, budget, recipe(Aggregate.SUM, power))
    errors = check(solution, tables, budget)
    best, cost = min((fsum(e**power for e in other), c) for _, c, other in every_plan(tables, budget))
    assert solution.objective == fsum(e**power for e in errors) == pytest.approx(best, rel=1e-12, abs=0)
    assert solution.gap == 0
    if grain:
        assert (solution.objective, solution.cost) == (best, cost)


@pytest.mark.parametrize("seed", range(20))
def test_sum_of_errors_over_many_decades_is_optimal(seed):
    rng = np.random.default_rng(seed)
    tables = [
        table(60, list(zip(range(5, 40, 7), -np.sort(-(10.0 ** rng.uniform(-12, 0, 5))), strict=True)))
        for _ in range(5)
    ]
    budget = int(rng.integers(25, 300))
    solution = solve(tables, budget, recipe(Aggregate.SUM, 4))
    check(solution, tables, budget)
    best = min(fsum(e**4 for e in errors) for _, _, errors in every_plan(tables, budget))
    assert solution.objective == pytest.approx(best, rel=1e-12, abs=0)


def dynamic_program(fronts, budget):
    """Least value for every budget, by the textbook."""
    best = np.zeros(budget + 1)
    for front in fronts:
        new = np.full(budget + 1, np.inf)
        for cost, value in zip(front.cost.tolist(), front.value.tolist(), strict=True):
            if cost <= budget:
                new[cost:] = np.minimum(new[cost:], best[: budget + 1 - cost] + value)
        best = new
    return best[budget]


def random_front(rng, n, correlated=False):
    cost = np.sort(rng.choice(np.arange(1, 300), n, replace=False))
    noise = rng.integers(-20, 20, n)
    value = np.sort(400.0 - cost + noise if correlated else rng.integers(0, 1000, n).astype(float))[::-1]
    keep = np.concatenate(([True], np.diff(value) < 0))
    return Front(cost[keep].astype(np.int64), value[keep])


@pytest.mark.parametrize("seed", range(60))
def test_knapsack_agrees_with_the_textbook_program(seed):
    rng = np.random.default_rng(seed)
    fronts = [random_front(rng, int(rng.integers(1, 40)), seed % 2 == 0) for _ in range(12)]
    low, high = (sum(int(front.cost[at]) for front in fronts) for at in (0, -1))
    budget = int(rng.integers(low, high + 1))
    picks, gap = solve_knapsack(fronts, budget)
    assert gap == 0
    assert sum(int(front.cost[n]) for front, n in zip(fronts, picks, strict=True)) <= budget
    value = sum(front.value[n] for front, n in zip(fronts, picks, strict=True))
    assert value == dynamic_program(fronts, budget)


def truncated(seed):
    rng = np.random.default_rng(seed)
    fronts = [random_front(rng, 30, correlated=True) for _ in range(8)]
    return fronts, sum(int(front.cost[front.cost.size // 2]) for front in fronts)


@pytest.mark.parametrize("seed", range(40))
def test_branch_and_cut_finishes_what_a_truncated_program_began(seed):
    fronts, budget = truncated(seed)
    picks, gap = solve_knapsack(fronts, budget, most_states=1)
    assert sum(int(front.cost[n]) for front, n in zip(fronts, picks, strict=True)) <= budget
    value = sum(front.value[n] for front, n in zip(fronts, picks, strict=True))
    assert value == pytest.approx(dynamic_program(fronts, budget), rel=1e-9)
    assert gap < 1e-6


@pytest.mark.parametrize("seed", range(40))
def test_without_the_time_to_finish_the_gap_says_so(seed, monkeypatch):
    monkeypatch.setattr(knapsack, "_SECONDS", 0.0)
    fronts, budget = truncated(seed)
    picks, gap = solve_knapsack(fronts, budget, most_states=1)
    assert sum(int(front.cost[n]) for front, n in zip(fronts, picks, strict=True)) <= budget
    value = sum(front.value[n] for front, n in zip(fronts, picks, strict=True))
    optimum = dynamic_program(fronts, budget)
    assert optimum <= value
    assert value - optimum <= gap * value * (1 + 1e-9)


def test_lower_hull_keeps_the_corners_only():
    assert lower_hull([0, 1, 2, 3, 4], [9.0, 9.0, 3.0, 2.0, 1.0]) == [0, 2, 4]
    assert lower_hull([5], [1.0]) == [0]


# --- uniform --------------------------------------------------------------------------------------


def families(rng):
    """A layer of several (fold, k), each with all ranks below its full rank that are cheaper."""
    kept = int(rng.integers(20, 80))
    rows, errors = [(-1, 0, 0, 0, kept)], [0.0]
    for family in range(rng.integers(1, 3)):
        full, slope = int(rng.integers(2, 9)), int(rng.integers(3, 15))
        for j in range(1, min(full, -(-kept // slope))):
            rows.append((family, 1, j, full, j * slope))
            errors.append(1 - j / full)
    fold, k, j, full, cost = np.array(rows, dtype=np.int64).T
    return Candidates("w", fold, k, j, full, cost, np.array(errors))


def uniform_plan(tables, ratio):
    """Rank max(1, ⌊ratio · full⌋) of every (fold, k), the cheapest of them, else keep; exact."""
    picks = []
    for t in tables:
        wanted = [n for n in range(1, t.cost.size) if t.j[n] == max(1, ratio * int(t.full[n]) // 1)]
        picks.append(min(wanted, key=lambda n: (t.cost[n], n)) if wanted else 0)
    return picks, sum(int(t.cost[n]) for t, n in zip(tables, picks, strict=True))


@pytest.mark.parametrize("seed", range(120))
def test_uniform_takes_the_largest_relative_rank_that_fits(seed):
    rng = np.random.default_rng(seed)
    tables = [families(rng) for _ in range(rng.integers(1, 6))]
    low, high = smallest(tables, recipe(Aggregate.UNIFORM)), sum(int(t.cost[0]) for t in tables)
    budget = int(rng.integers(low, high + 1))
    solution = solve(tables, budget, recipe(Aggregate.UNIFORM))
    errors = check(solution, tables, budget)
    ratios = sorted({Fraction(a, b) for b in range(1, 9) for a in range(b + 1)})
    plans = [uniform_plan(tables, ratio) for ratio in ratios]
    assert list(solution.picks) == [picks for picks, cost in plans if cost <= budget][-1]
    assert solution.objective == max(errors)
    assert solution.gap is None


def test_a_rank_lasts_until_the_next_one_of_its_fold():
    """Ranks that suit a layout leave gaps, in every fold its own."""

    def layer(*rows):
        fold, k, j, full, cost = np.array([(-1, 0, 0, 0, 100), *rows], dtype=np.int64).T
        return Candidates("w", fold, k, j, full, cost, np.append(0.0, 1 - j[1:] / full[1:]))

    skipping = layer((0, 1, 1, 8, 50), (0, 1, 2, 8, 95), (0, 1, 3, 8, 96), (1, 1, 1, 8, 10), (1, 1, 4, 8, 40))
    plain = layer(*((0, 1, j, 8, 5 * j) for j in range(1, 8)))
    # At a relative rank of 3/8 the second fold still has rank 1, until 4/8.
    assert list(solve([skipping, plain], 25, recipe(Aggregate.UNIFORM)).picks) == [4, 3]


# --- a price --------------------------------------------------------------------------------------


def priced_tables(rng):
    tables = []
    for _ in range(rng.integers(1, 5)):
        n = int(rng.integers(1, 7))
        price = np.sort(rng.choice(np.arange(1, 60), n, replace=False))
        cost = np.sort(rng.choice(np.arange(1, 40), n, replace=False))
        errors = -np.sort(-rng.random(n))
        kept = int(rng.integers(30, 80))
        tables.append(table(50, list(zip(cost.tolist(), errors, strict=True)), [kept, *price.tolist()]))
    return tables


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("seed", range(60))
def test_price_takes_the_smallest_multiplier_that_fits(seed, power):
    rng = np.random.default_rng(seed)
    tables, how = priced_tables(rng), recipe(Aggregate.SUM, power)
    low = smallest(tables, how)
    budget = int(rng.integers(low, sum(int(t.cost[0]) for t in tables) + 1))
    solution = solve(tables, budget, how)
    check(solution, tables, budget)
    values = [t.error**power for t in tables]
    slopes = {
        float((v[a] - v[b]) / (t.price[b] - t.price[a]))
        for t, v in zip(tables, values, strict=True)
        for a in range(t.cost.size)
        for b in range(t.cost.size)
        if t.price[b] > t.price[a] and v[a] > v[b]
    }
    corners = sorted({0.0, *slopes})

    def total(multiplier):
        picks = [np.argmin(v + multiplier * t.price) for t, v in zip(tables, values, strict=True)]
        return sum(int(t.cost[n]) for t, n in zip(tables, picks, strict=True))

    # Between two neighbours of `corners` every layer has one minimizer.
    between = [(a + b) / 2 for a, b in zip(corners, [*corners[1:], 2 * corners[-1] + 1], strict=True)]
    fitting = next(m for m in between if total(m) <= budget)
    at = corners[between.index(fitting)]
    for t, v, pick in zip(tables, values, solution.picks, strict=True):
        assert v[pick] + at * t.price[pick] <= (v + at * t.price).min() + 1e-12
    assert low <= min(map(total, between))
    assert solution.gap is None


# --- several limits -------------------------------------------------------------------------------


def routed(seed, grain=None):
    """Layers that some of several routes pass, some of them more than once, and what each route leaves."""
    tables, _ = instance(2000 + seed, grain)
    rng = np.random.default_rng(seed)
    runs = rng.integers(0, 3, (len(tables), 3))
    costs = [counts[:, None] * t.cost for counts, t in zip(runs, tables, strict=True)]
    low, high = (sum(reduce(part, axis=1) for part in costs) for reduce in (np.min, np.max))
    return tables, Limits(rng.integers(low, high + 1), tuple(costs))


def fitting(tables, limits):
    """The errors of all plans within the limits."""
    for picks in product(*(range(t.cost.size) for t in tables)):
        if all(
            sum(cost[r, n] for cost, n in zip(limits.costs, picks, strict=True)) <= budget
            for r, budget in enumerate(limits.budgets.tolist())
        ):
            yield [float(t.error[n]) for t, n in zip(tables, picks, strict=True)]


@pytest.mark.parametrize("power", [1, 4])
@pytest.mark.parametrize("seed", range(60))
def test_sum_under_several_limits_is_the_optimum(seed, power):
    tables, limits = routed(seed)
    solution = solver.solve(tables, limits, recipe(Aggregate.SUM, power))
    assert limits.excess(solution.picks) <= 0
    best = min(fsum(e**power for e in errors) for errors in fitting(tables, limits))
    assert solution.objective == pytest.approx(best, rel=1e-12, abs=0)
    assert solution.gap == 0


@pytest.mark.parametrize("seed", range(60))
def test_max_under_several_limits_is_the_lexicographic_optimum(seed):
    tables, limits = routed(seed)
    solution = solver.solve(tables, limits, recipe(Aggregate.MAX))
    assert limits.excess(solution.picks) <= 0
    errors = [float(t.error[n]) for t, n in zip(tables, solution.picks, strict=True)]
    assert sorted(errors, reverse=True) == min(sorted(e, reverse=True) for e in fitting(tables, limits))


@pytest.mark.parametrize("seed", range(60))
def test_max_under_several_limits_is_the_optimum_where_layers_tie(seed):
    tables, limits = routed(seed, grain=3)
    solution = solver.solve(tables, limits, recipe(Aggregate.MAX))
    assert limits.excess(solution.picks) <= 0
    assert solution.objective == min(max(errors) for errors in fitting(tables, limits))


@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_plan_is_so_under_every_limit(seed):
    tables, limits = routed(seed)
    low = sum(cost.min(axis=1) for cost in limits.costs)
    for how in (recipe(Aggregate.MAX), recipe(Aggregate.SUM)):
        picks = solver.smallest(tables, limits, how).picks
        assert (limits.budgets - limits.spare(picks) == low).all()
        with pytest.raises(BudgetError):
            solver.solve(tables, Limits(low - (low == low.max()), limits.costs), how)


@pytest.mark.parametrize("most_states", [0, 1 << 15])
@pytest.mark.parametrize("seed", range(30))
def test_knapsacks_agree_with_every_selection(seed, most_states):
    rng = np.random.default_rng(seed)
    costs = [rng.integers(1, 50, (2, 5)) for _ in range(5)]
    costs = [np.sort(cost, axis=1) for cost in costs]
    values = [-np.sort(-rng.random(5)) for _ in range(5)]
    budgets = sum(cost[:, 2] for cost in costs)
    picks, gap = solve_knapsacks(costs, values, budgets, most_states)
    assert (sum(cost[:, n] for cost, n in zip(costs, picks, strict=True)) <= budgets).all()
    best = min(
        sum(value[n] for value, n in zip(values, other, strict=True))
        for other in product(range(5), repeat=5)
        if (sum(cost[:, n] for cost, n in zip(costs, other, strict=True)) <= budgets).all()
    )
    assert sum(value[n] for value, n in zip(values, picks, strict=True)) == pytest.approx(best, rel=1e-9)
    assert gap < 1e-5 if most_states == 0 else gap == 0


@pytest.mark.parametrize("seed", range(30))
def test_without_the_time_to_finish_several_limits_the_gap_says_so(seed, monkeypatch):
    monkeypatch.setattr(knapsack, "_SECONDS", 0.0)
    fronts, budget = truncated(seed)
    costs = [np.stack([front.cost, front.cost]) for front in fronts]
    values = [front.value for front in fronts]
    picks, gap = solve_knapsacks(costs, values, np.array([budget, budget]), 0)
    assert sum(int(front.cost[n]) for front, n in zip(fronts, picks, strict=True)) <= budget
    value, optimum = (
        sum(front.value[n] for front, n in zip(fronts, picks, strict=True)),
        dynamic_program(fronts, budget),
    )
    assert optimum <= value
    assert value - optimum <= gap * value * (1 + 1e-9)


@pytest.mark.parametrize("aggregate", [Aggregate.MAX, Aggregate.SUM])
def test_nothing_is_proven_where_limits_order_candidates_differently(aggregate):
    limits = Limits(np.array([70]), tuple(t.cost[None, :] for t in TWO), alike=False)
    assert solver.solve(TWO, limits, recipe(aggregate)).gap == 1


# --- edges ----------------------------------------------------------------------------------------

RULES = [recipe(Aggregate.MAX), recipe(Aggregate.SUM, 4), recipe(Aggregate.UNIFORM)]
TWO = [table(100, [(10, 0.5), (60, 0.25)]), table(50, [(5, 0.75)])]


@pytest.mark.parametrize("how", RULES)
def test_the_smallest_budget_is_met_exactly_and_one_below_it_is_an_error(how):
    assert smallest(TWO, how) == 15
    solution = solve(TWO, 15, how)
    assert (solution.picks, solution.cost) == ((1, 1), 15)
    with pytest.raises(BudgetError, match=r"^The smallest plan of recipe 'test' exceeds its budget by 1:"):
        solve(TWO, 14, how)


@pytest.mark.parametrize("how", RULES)
@pytest.mark.parametrize("budget", [150, 10**15])
def test_a_budget_for_everything_keeps_everything(how, budget):
    solution = solve(TWO, budget, how)
    assert (solution.picks, solution.cost, solution.objective) == ((0, 0), 150, 0)


@pytest.mark.parametrize("how", RULES)
def test_no_layers_have_the_empty_plan(how):
    solution = solve([], 0, how)
    assert (solution.picks, solution.cost, solution.objective) == ((), 0, 0)
    assert solution.gap == (None if how.aggregate is Aggregate.UNIFORM else 0)
    with pytest.raises(BudgetError):
        solve([], -1, how)


@pytest.mark.parametrize("how", RULES)
def test_layers_without_options_are_kept(how):
    assert solve([table(7, []), table(9, [(3, 0.5)])], 10, how).picks == (0, 1)
    with pytest.raises(BudgetError):
        solve([table(7, [])], 6, how)


@pytest.mark.parametrize("how", RULES[:2])
def test_an_option_without_error_is_taken_before_keep(how):
    zero = table(100, [(10, 0.0)])
    assert solve([zero], 1000, how).picks == (1,)
    assert solve([zero, TWO[0]], 110, how).picks == (1, 0)


@pytest.mark.parametrize(("budget", "picks"), [(10, (1,)), (59, (1,)), (60, (2,)), (99, (2,)), (100, (0,))])
@pytest.mark.parametrize("how", RULES[:2])
def test_a_single_layer_takes_the_best_that_fits(how, budget, picks):
    assert solve(TWO[:1], budget, how).picks == picks


@pytest.mark.parametrize("how", RULES[:2])
def test_equal_layers_go_in_graph_order(how):
    same = [table(100, [(10, 0.5), (20, 0.25)]) for _ in range(4)]
    assert sorted(solve(same, 60, how).picks) == [1, 1, 2, 2]
    assert solve(same, 60, how) == solve(same, 60, how)


def test_the_leftover_goes_on_behind_the_layer_that_decides():
    # Nothing below 0.75 fits for the second; what is left improves the first.
    solution = solve([TWO[0], table(1000, [(5, 0.75)])], 70, recipe(Aggregate.MAX))
    assert (solution.picks, solution.objective, solution.cost) == ((2, 1), 0.75, 65)
