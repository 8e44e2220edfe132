"""One share of the cost for every layer, against scans of all shares and the formulas of the papers."""

from dataclasses import replace

import numpy as np
import pytest

from onnx_lowrank.allocate import solve as solver
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.ratio import by_ratio
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError

RATIO = Recipe("test", "A test.", tuple(Fold), None, aggregate=Aggregate.RATIO)


def table(keep, costs, yields=1.0, full=1000):
    """Candidates of keep and of options with these costs, ascending, of falling error."""
    n, costs = len(costs), np.array(costs, dtype=np.int64)
    ints = [np.array([first, *[1] * n]) for first in (-1, 0)]
    return Candidates(
        layer="w",
        fold=ints[0],
        k=ints[1],
        j=np.arange(n + 1),
        full=np.full(n + 1, full),
        cost=np.concatenate([[keep], costs]),
        error=np.concatenate([[0.0], 1 - np.arange(n) / max(n, 1)]),
        yields=yields,
    )


def matrix(f, c, yields=1.0):
    """Ranks of a matrix that are cheaper than it."""
    ranks = range(1, min(f, c))
    return table(f * c, [j * (f + c) for j in ranks if j * (f + c) < f * c], yields, min(f, c))


SHAPES = [(384, 384), (1536, 384), (384, 1536), (64, 576), (10, 64)]


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.61, 0.5, 0.3, 0.15])
def test_every_layer_reaches_the_ratio_within_one_rank(ratio):
    tables = [matrix(*shape) for shape in SHAPES]
    budget = int(ratio * sum(int(t.cost[0]) for t in tables))
    solution = solver.solve(tables, Limits.single(tables, budget), RATIO)
    assert solution.gap is None
    assert solution.cost <= budget
    chosen = [int(t.cost[pick]) for t, pick in zip(tables, solution.picks, strict=True)]
    shares = [cost / int(t.cost[0]) for cost, t in zip(chosen, tables, strict=True)]
    reached = max(shares)
    for (f, c), t, cost in zip(SHAPES, tables, chosen, strict=True):
        assert cost <= reached * t.cost[0] < cost + f + c
    # The next larger ratio, of whichever layer, is too large.
    grown = [min(int(x) for x in t.cost if x > cost) for t, cost in zip(tables, chosen, strict=True)]
    ahead = min(g / int(t.cost[0]) for g, t in zip(grown, tables, strict=True))
    exact = [max(int(x) for x in t.cost if x <= ahead * t.cost[0]) for t in tables]
    assert sum(exact) > budget
    assert reached == pytest.approx(ratio, abs=0.02)


def test_one_relative_rank_is_another_rule():
    """At one relative rank, a square matrix keeps more of its cost than an oblong one."""
    tables = [matrix(100, 100), matrix(100, 900)]

    def shares(aggregate):
        solution = solver.solve(tables, Limits.single(tables, 50_000), replace(RATIO, aggregate=aggregate))
        return [int(t.cost[n]) / int(t.cost[0]) for t, n in zip(tables, solution.picks, strict=True)]

    assert shares(Aggregate.RATIO) == pytest.approx([0.5, 0.5], abs=0.01)
    assert shares(Aggregate.UNIFORM) == pytest.approx([0.82, 0.46], abs=0.02)


@pytest.mark.parametrize("seed", range(60))
def test_no_smaller_share_fits(seed):
    """Against a scan of all shares that layers can give up, layers of one, few and many candidates."""
    rng = np.random.default_rng(seed)
    tables = [
        table(60, np.sort(rng.choice(59, rng.integers(0, 8), replace=False) + 1), rng.uniform(0.2, 3))
        for _ in range(rng.integers(1, 5))
    ]
    least, most = (sum(int(reduce(t.cost)) for t in tables) for reduce in (np.min, np.max))
    budget = int(rng.integers(least, most + 1))

    def plan(share):
        kept = [[int(x) for x in t.cost if x <= t.cost[0] * (1 - share * t.yields) + 1e-9] for t in tables]
        return [max(costs) if costs else int(t.cost.min()) for costs, t in zip(kept, tables, strict=True)]

    shares = {(60 - int(x)) / 60 / t.yields for t in tables for x in t.cost}
    wanted = next(costs for share in sorted(shares) if sum(costs := plan(share)) <= budget)
    picks = by_ratio(tables, Limits.single(tables, budget))
    assert [int(t.cost[n]) for t, n in zip(tables, picks, strict=True)] == wanted


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_the_shares_are_those_of_modegpt(temperature):
    """φ_i = L · φ · softmax(−s_i / ε), in steps of a thousandth of the cost."""
    scores = np.array([0.31, 0.05, 0.12, 0.2])
    share = np.exp(-scores / temperature)
    wanted = len(scores) * 0.2 * share / share.sum()
    tables = [table(1000, range(1, 1000), float(one)) for one in share]
    picks = by_ratio(tables, Limits.single(tables, 4 * 800))
    given = [1 - int(t.cost[n]) / 1000 for t, n in zip(tables, picks, strict=True)]
    np.testing.assert_allclose(given, wanted, atol=2e-3)


def test_a_layer_without_a_candidate_so_small_takes_its_cheapest():
    tables = [table(100, [90]), table(100, range(1, 100))]
    picks = by_ratio(tables, Limits.single(tables, 120))
    assert [int(t.cost[n]) for t, n in zip(tables, picks, strict=True)] == [90, 30]


def test_all_is_kept_where_nothing_has_to_go():
    tables = [matrix(20, 30), table(7, [])]
    assert by_ratio(tables, Limits.single(tables, 607)) == [0, 0]


def test_a_budget_below_the_cheapest_plan_is_refused():
    tables = [matrix(20, 30), table(7, [])]
    limits = Limits.single(tables, 56)
    assert solver.smallest(tables, limits, RATIO).cost == 57
    with pytest.raises(BudgetError, match="exceeds its budget by 1"):
        solver.solve(tables, limits, RATIO)


def test_every_route_keeps_its_limit():
    tables = [matrix(20, 30), matrix(30, 20)]
    costs = tuple(np.stack([t.cost, factor * t.cost]) for factor, t in zip((1, 3), tables, strict=True))
    limits = Limits(np.array([10_000, 1200]), costs)
    solution = solver.solve(tables, limits, RATIO)
    assert limits.excess(solution.picks) <= 0
    own, other = (int(t.cost[n]) for t, n in zip(tables, solution.picks, strict=True))
    assert own == other == 300
