"""The plan: one candidate for every layer, chosen to a proven optimum under the budget."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum
from operator import itemgetter

import numpy as np

from onnx_lowrank.allocate.cost import Ints
from onnx_lowrank.allocate.knapsack import Front, lower_hull, solve_knapsack, solve_knapsacks
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.ratio import by_ratio
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError
from onnx_lowrank.measures import Floats


@dataclass(frozen=True, slots=True)
class Solution:
    """One candidate for every layer.

    Attributes:
        picks: Index into each layer's candidates.
        cost: Their total cost.
        objective: The value that the recipe minimizes: the largest error (max), or the sum of the errors to
            the recipe's power (sum). Under uniform and ratio, the largest error, which follows from the rule.
        gap: Proven upper bound on (objective − optimum) / objective: 0 is a proven optimum, 1 proves nothing.
            None under uniform and ratio and with a price: these follow a rule and minimize no objective.
    """

    picks: tuple[int, ...]
    cost: int
    objective: float
    gap: float | None


def smallest(tables: Sequence[Candidates], limits: Limits, recipe: Recipe) -> Solution:
    """The plan of a recipe that exceeds the limits least, or stays farthest below them.

    Args:
        tables: The candidates of every layer, in graph order.
        limits: The constraints on the plan.
        recipe: The rule that defines the possible plans.
    """
    gap: float | None = None
    if recipe.aggregate is Aggregate.UNIFORM:
        picks = [_at_ratio(table, 0.0) for table in tables]
    elif _is_priced(tables):
        _, picks = min(_priced_path(tables, limits, recipe.power), key=itemgetter(0))
    else:
        picks = [_front(table)[0] for table in tables]
        gap = None if recipe.aggregate is Aggregate.RATIO else 1.0
    return _solution(tables, picks, recipe, gap)


def unchanged(tables: Sequence[Candidates], recipe: Recipe) -> Solution:
    """The plan that keeps every layer, which makes no error."""
    follows_rule = recipe.aggregate in (Aggregate.UNIFORM, Aggregate.RATIO)
    return _solution(tables, [0] * len(tables), recipe, None if follows_rule else 0.0)


def solve(tables: Sequence[Candidates], limits: Limits, recipe: Recipe) -> Solution:
    """Choose the candidates that minimize a recipe's objective within the limits.

    - max: minimize the largest error, with proof. The layer with this error is settled; then the same is done
      for the remaining layers until every layer is settled. If no two layers tie at an error at which one is
      settled, the sorted errors are the lexicographic minimum. Layers that tie go below the error in the
      order of their next step's cost. Under one budget, as many as possible do so at the first tie; after a
      tie, nothing is proven.
    - sum: minimize the sum of errors to the recipe's power, a multiple-choice knapsack, up to the gap that
      the solution states.
    - sum with a price: minimize the sum of errors to the power plus λ · price, for the smallest λ whose costs
      fit (Idelbayev and Carreira-Perpiñán, Low-rank compression of neural nets: learning the rank of each
      layer, CVPR 2020).
    - uniform: the largest ρ at which all layers fit at rank max(1, ⌊ρ · full rank⌋), in whole blocks. A layer
      that is no cheaper at this rank is kept. A layer with several (fold, k) takes the cheapest.
    - ratio: the largest share of its cost that every layer may keep (`allocate.ratio`).

    Equal objectives go to the lower cost (sum: only under one budget), then to the order of the candidates.

    Args:
        tables: The candidates of every layer, in graph order.
        limits: The constraints on the plan.
        recipe: The objective to minimize.

    Raises:
        BudgetError: Even the smallest plan exceeds the limits.
    """
    excess = limits.excess(smallest(tables, limits, recipe).picks)
    if excess > 0:
        raise BudgetError(
            f"The smallest plan of recipe {recipe.name!r} exceeds its budget by {excess}: "
            "raise the ratio or choose another recipe."
        )
    gap: float | None = None
    if recipe.aggregate is Aggregate.UNIFORM:
        picks = _uniform(tables, limits)
    elif recipe.aggregate is Aggregate.RATIO:
        picks = by_ratio(tables, limits)
    elif _is_priced(tables):
        path = _priced_path(tables, limits, recipe.power)
        picks = next(picks for excess, picks in path if excess <= 0)
    elif recipe.aggregate is Aggregate.MAX:
        picks, gap = _minimize_largest(tables, limits), 0.0
    else:
        picks, gap = _minimize_sum(tables, limits, recipe.power)
    if gap is not None and not limits.alike:
        gap = 1.0
    return _solution(tables, picks, recipe, gap)


def _solution(
    tables: Sequence[Candidates], picks: Sequence[int], recipe: Recipe, gap: float | None
) -> Solution:
    pairs = list(zip(tables, picks, strict=True))
    errors = [float(table.error[pick]) for table, pick in pairs]
    total = recipe.aggregate is Aggregate.SUM
    return Solution(
        picks=tuple(picks),
        cost=sum(int(table.cost[pick]) for table, pick in pairs),
        objective=fsum(error**recipe.power for error in errors) if total else max(errors, default=0.0),
        gap=gap,
    )


def _is_priced(tables: Sequence[Candidates]) -> bool:
    return any(table.price is not None for table in tables)


def _prices(table: Candidates) -> Ints:
    return table.cost if table.price is None else table.price


def _front(table: Candidates) -> list[int]:
    """Candidates by ascending price and strictly descending error.

    The options already have this order. Keep, which has no error, goes after the options that are cheaper,
    unless the last of them has no error either.
    """
    prices = _prices(table)
    options = [int(n) for n in np.flatnonzero(prices < prices[0])]
    return options if options and table.error[options[-1]] == 0 else [*options, 0]


def _minimize_largest(tables: Sequence[Candidates], limits: Limits) -> list[int]:
    """Walk down the finite set of errors from the cheapest plan.

    A layer's cheapest candidate below an error does not depend on the other layers, and costs never fall on
    the way down. So the largest error is minimal when the first layer with this error cannot go further
    within the limits. This layer is settled, and the walk continues with the others. Layers that tie go in
    the order of their next step's cost: under one budget, as many of them as possible go below.
    """
    fronts = [_front(table) for table in tables]
    spare = limits.spare([front[0] for front in fronts])
    at = [0] * len(tables)

    def step(i: int) -> Ints:
        here, there = fronts[i][at[i]], fronts[i][at[i] + 1]
        costs: Ints = limits.costs[i][:, there] - limits.costs[i][:, here]
        return costs

    def entry(i: int) -> tuple[float, int, int]:
        return -float(tables[i].error[fronts[i][at[i]]]), int(step(i).sum()), i

    heap = [entry(i) for i, front in enumerate(fronts) if len(front) > 1]
    heapq.heapify(heap)
    while heap:
        *_, i = heapq.heappop(heap)
        if (step(i) <= spare).all():
            spare -= step(i)
            at[i] += 1
            if at[i] + 1 < len(fronts[i]):
                heapq.heappush(heap, entry(i))
    return [front[i] for front, i in zip(fronts, at, strict=True)]


def _minimize_sum(tables: Sequence[Candidates], limits: Limits, power: float) -> tuple[list[int], float]:
    fronts = [np.array(_front(table)) for table in tables]
    costs = [costs[:, front] for costs, front in zip(limits.costs, fronts, strict=True)]
    values = [table.error[front] ** power for table, front in zip(tables, fronts, strict=True)]
    if limits.budgets.size > 1:
        picks, gap = solve_knapsacks(costs, values, limits.budgets)
    else:
        # A layer that the only route does not run costs nothing there: only its best candidate remains.
        fronts = [
            front[-1:] if np.ptp(cost) == 0 else front for front, cost in zip(fronts, costs, strict=True)
        ]
        classes = [
            Front(cost[0, -front.size :], value[-front.size :])
            for front, cost, value in zip(fronts, costs, values, strict=True)
        ]
        picks, gap = solve_knapsack(classes, int(limits.budgets[0]))
    return [int(front[pick]) for front, pick in zip(fronts, picks, strict=True)], gap


def _priced_path(
    tables: Sequence[Candidates], limits: Limits, power: float
) -> Iterator[tuple[int, list[int]]]:
    """The excess and the picks of each minimizer of Σ error^power + λ · price, for λ from 0 to infinity.

    The minimizers change only at the slopes of the layers' lower convex hulls.
    """
    hulls, steps = [], []
    for i, table in enumerate(tables):
        front = _front(table)
        prices = [int(_prices(table)[n]) for n in front]
        values = [float(table.error[n]) ** power for n in front]
        corners = lower_hull(prices, values)
        hulls.append([front[n] for n in corners])
        steps += [
            ((values[a] - values[b]) / (prices[b] - prices[a]), i, at)
            for at, (a, b) in enumerate(pairwise(corners))
        ]
    picks = [hull[-1] for hull in hulls]
    spare = limits.spare(picks)
    yield -int(spare.min()), list(picks)
    for _, i, at in sorted(steps):
        spare += limits.costs[i][:, picks[i]] - limits.costs[i][:, hulls[i][at]]
        picks[i] = hulls[i][at]
        yield -int(spare.min()), list(picks)


def _uniform(tables: Sequence[Candidates], limits: Limits) -> list[int]:
    """Search for the largest ρ that fits; costs grow with ρ, and only at ratios of a rank to full rank."""
    ratios = np.unique(np.concatenate([[0.0], *(ratio for table in tables for ratio in _ratios(table))]))

    def picks(ratio: float) -> list[int]:
        return [_at_ratio(table, ratio) for table in tables]

    return picks(ratios[bisect_right(ratios, 0, key=lambda ratio: limits.excess(picks(ratio))) - 1])


def _ratios(table: Candidates) -> tuple[Floats, Floats]:
    """For each option, without keep: the interval of ρ in which the layer has its rank.

    It ends at the next rank of the same fold and slice count. The last one is as long as the one before it.
    """
    fold, k, j = table.fold[1:], table.k[1:], table.j[1:]
    follows = (fold[1:] == fold[:-1]) & (k[1:] == k[:-1])
    end = j + table.block
    end[1:][follows] += (j[1:] - j[:-1] - table.block)[follows]
    end[:-1][follows] = j[1:][follows]
    begin = np.where(j == table.block, 0, j)
    return begin / table.full[1:], end / table.full[1:]


def _at_ratio(table: Candidates, ratio: float) -> int:
    begin, end = _ratios(table)
    options = np.flatnonzero((begin <= ratio) & (ratio < end)) + 1
    # Candidates come in the order that breaks ties, and argmin takes the first.
    return int(options[np.argmin(table.cost[options])]) if options.size else 0
