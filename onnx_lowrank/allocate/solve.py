"""The plan: one of its candidates for every layer, chosen to a proven optimum under the budget."""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import fsum

import numpy as np

from onnx_lowrank.allocate.knapsack import Front, lower_hull, solve_knapsack
from onnx_lowrank.allocate.options import Candidates, Floats, Ints
from onnx_lowrank.errors import BudgetError
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.types import Aggregate


@dataclass(frozen=True, slots=True)
class Solution:
    """One candidate for every layer.

    Attributes:
        picks: Index into each layer's candidates.
        cost: Their total cost, at most the budget.
        objective: What the recipe minimizes: the largest error (max), the sum of the errors to the
            recipe's power (sum); under uniform, the largest error, which follows from the rank.
        gap: Proven upper bound on (objective − optimum) / objective; 0 is a proven optimum.
    """

    picks: tuple[int, ...]
    cost: int
    objective: float
    gap: float = 0.0


def smallest(tables: Sequence[Candidates], recipe: Recipe) -> int:
    """The least total cost that a recipe can reach."""
    if _is_priced(tables):
        return min(total for total, _ in _priced_path(tables, recipe.power))
    return sum(int(table.cost.min()) for table in tables)


def solve(tables: Sequence[Candidates], budget: int, recipe: Recipe) -> Solution:
    """Choose the candidates which minimize a recipe's objective at a total cost within the budget.

    - max: the least largest error; then, of the layers at this error as many as possible go below it,
      then the largest error of all others is minimized in turn, until every layer is settled.
    - sum: the least sum of errors to the recipe's power, a multiple-choice knapsack.
    - sum with a price: the least sum of errors to the power plus λ · price at the smallest λ whose
      total cost fits (Idelbayev and Carreira-Perpiñán, Low-rank compression of neural nets: learning
      the rank of each layer, CVPR 2020).
    - uniform: the largest ρ at which all layers at rank max(1, ⌊ρ · full rank⌋) fit; a layer that is
      no cheaper at this rank is kept, and of several (fold, k) a layer takes the cheapest.

    Equal objectives go to the lower cost, then to the order of the candidates.

    Args:
        tables: The candidates of every layer, in graph order.
        budget: Largest total cost of these layers.
        recipe: What to minimize.

    Raises:
        BudgetError: Even the smallest total cost exceeds the budget.
    """
    least = smallest(tables, recipe)
    if least > budget:
        raise BudgetError(
            f"The layers cannot cost less than {least} with recipe {recipe.name!r}, "
            f"but the budget leaves {budget} for them: raise the ratio or choose another recipe."
        )
    gap = 0.0
    if recipe.aggregate is Aggregate.MAX:
        picks = _minimize_largest(tables, budget)
    elif recipe.aggregate is Aggregate.UNIFORM:
        picks = _uniform(tables, budget)
    elif _is_priced(tables):
        picks = next(picks for total, picks in _priced_path(tables, recipe.power) if total <= budget)
    else:
        picks, gap = _minimize_sum(tables, budget, recipe.power)
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

    The options already are; keep, without error, goes behind those that are cheaper unless the last of
    them has no error either.
    """
    prices = _prices(table)
    options = [int(n) for n in np.flatnonzero(prices < prices[0])]
    return options if options and table.error[options[-1]] == 0 else [*options, 0]


def _minimize_largest(tables: Sequence[Candidates], budget: int) -> list[int]:
    """Walk down the finite set of errors from the cheapest plan.

    A layer's cheapest candidate below an error does not depend on the other layers, and the total cost
    only grows on the way down. So the largest error is least where the first layer at it can go no
    further within the budget; this layer is settled, and the walk goes on with the others. Layers that
    tie go in the order of the cost of their next step: then as many of them as possible go below.
    """
    fronts = [_front(table) for table in tables]
    spare = budget - sum(int(table.cost[front[0]]) for table, front in zip(tables, fronts, strict=True))
    at = [0] * len(tables)

    def entry(i: int) -> tuple[float, int, int]:
        here, there = fronts[i][at[i]], fronts[i][at[i] + 1]
        return -float(tables[i].error[here]), int(tables[i].cost[there] - tables[i].cost[here]), i

    heap = [entry(i) for i, front in enumerate(fronts) if len(front) > 1]
    heapq.heapify(heap)
    while heap:
        _, step, i = heapq.heappop(heap)
        if step <= spare:
            spare -= step
            at[i] += 1
            if at[i] + 1 < len(fronts[i]):
                heapq.heappush(heap, entry(i))
    return [front[i] for front, i in zip(fronts, at, strict=True)]


def _minimize_sum(tables: Sequence[Candidates], budget: int, power: float) -> tuple[list[int], float]:
    fronts = [np.array(_front(table)) for table in tables]
    classes = [
        Front(table.cost[front], table.error[front] ** power)
        for table, front in zip(tables, fronts, strict=True)
    ]
    picks, gap = solve_knapsack(classes, budget)
    return [int(front[pick]) for front, pick in zip(fronts, picks, strict=True)], gap


def _priced_path(tables: Sequence[Candidates], power: float) -> Iterator[tuple[int, list[int]]]:
    """Total costs and picks that minimize Σ error^power + λ · price, for λ from 0 to infinity.

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
    total = sum(int(table.cost[pick]) for table, pick in zip(tables, picks, strict=True))
    yield total, list(picks)
    for _, i, at in sorted(steps):
        total += int(tables[i].cost[hulls[i][at]] - tables[i].cost[picks[i]])
        picks[i] = hulls[i][at]
        yield total, list(picks)


def _uniform(tables: Sequence[Candidates], budget: int) -> list[int]:
    """The total cost grows with ρ, and it changes only at ratios of a rank to its full rank."""
    ratios = np.unique(np.concatenate([[0.0], *(ratio for table in tables for ratio in _ratios(table))]))

    def picks(ratio: float) -> list[int]:
        return [_at_ratio(table, ratio) for table in tables]

    def total(ratio: float) -> int:
        return sum(int(table.cost[pick]) for table, pick in zip(tables, picks(ratio), strict=True))

    return picks(ratios[bisect_right(ratios, budget, key=total) - 1])


def _ratios(table: Candidates) -> tuple[Floats, Floats]:
    """The relative ranks at which options (keep excluded) begin and end to be the layer's."""
    begin = np.where(table.j[1:] == 1, 0, table.j[1:] / table.full[1:])
    return begin, (table.j[1:] + 1) / table.full[1:]


def _at_ratio(table: Candidates, ratio: float) -> int:
    begin, end = _ratios(table)
    options = np.flatnonzero((begin <= ratio) & (ratio < end)) + 1
    # Candidates come in the order of ties, of which argmin takes the first.
    return int(options[np.argmin(table.cost[options])]) if options.size else 0
