"""The multiple-choice knapsack with proof of optimality: one item per class, least value under a budget.

The solver has three steps.

1. A Lagrangian multiplier gives a lower bound on the optimum and a first solution. An item with a reduced
   cost above the distance between the two is in no better solution, and is removed (D. Pisinger, A minimal
   algorithm for the multiple-choice knapsack problem, 1995).
2. Dynamic programming over the classes solves the rest. A state is the pair (cost, value) of the choices so
   far. A state is dropped if another state beats it, or if its bound exceeds the best known solution; the
   bound adds the linear relaxation of the remaining classes. Rounding these relaxations to items improves
   the best known solution.
3. If the states outgrow their limit, branch and cut (HiGHS) continues with the remaining items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum

import numpy as np
import scipy  # imports its parts on first use; they take as long as a small model does
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Indices = NDArray[np.intp]

_ROUNDING = 1 + 1e-12
"""Tolerance of comparisons with a bound: bounds are rounded float64 sums of up to thousands of terms."""

_MOST_STATES = 1 << 15
_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Front:
    """The items of one class: ascending integer costs, strictly descending non-negative values."""

    cost: Ints
    value: Floats

    def take(self, items: Indices) -> Front:
        """The class with only some of its items."""
        return Front(self.cost[items], self.value[items])


def solve_knapsack(
    fronts: Sequence[Front], budget: int, most_states: int = _MOST_STATES
) -> tuple[list[int], float]:
    """Choose one item of every class with the least total value at a total cost within the budget.

    Args:
        fronts: The classes.
        budget: Largest total cost; at least the sum of the classes' first costs.
        most_states: The largest number of states of the dynamic program. The gap accounts for states that
            it drops beyond this number.

    Returns:
        The index of the item of every class, and the proven relative gap between their value and the
        optimum: 0 unless `most_states` was too small. Among equally good solutions it is the cheapest.
    """
    if sum(int(front.cost[-1]) for front in fronts) <= budget:
        return [front.cost.size - 1 for front in fronts], 0.0
    relaxed, multiplier = _relax(fronts, budget)
    spare = budget - _total_cost(fronts, relaxed)
    bound = _total_value(fronts, relaxed) - multiplier * spare
    picks = _fill(fronts, relaxed, spare)
    best = _total_value(fronts, picks)
    reduced = [
        front.value - front.value[pick] + multiplier * (front.cost - front.cost[pick])
        for front, pick in zip(fronts, relaxed, strict=True)
    ]
    # Not <, or rounding removes the optimal items of a budget that the relaxation meets exactly.
    cores = [np.flatnonzero(costs <= best * _ROUNDING - bound) for costs in reduced]
    # Coarse classes first: the finer the steps that remain, the tighter their linear relaxation.
    order = sorted(range(len(fronts)), key=lambda i: (-int(np.ptp(fronts[i].cost[cores[i]])), i))
    found, lowest = _program([fronts[i].take(cores[i]) for i in order], budget, best, most_states)
    if found:
        improved = [int(cores[i][item]) for i, item in sorted(zip(order, found, strict=True))]
        picks = min(improved, picks, key=lambda items: _total_value(fronts, items))
    value = _total_value(fronts, picks)
    if lowest * _ROUNDING >= value:
        return picks, 0.0
    cut, lowest = _branch_and_cut(
        [front.cost[None, core] for front, core in zip(fronts, cores, strict=True)],
        [front.value[core] for front, core in zip(fronts, cores, strict=True)],
        np.array([budget]),
        lowest,
        lowest,
    )
    if cut:
        items = [int(core[item]) for core, item in zip(cores, cut, strict=True)]
        picks = min(items, picks, key=lambda choice: _total_value(fronts, choice))
    return picks, max(0.0, 1 - lowest / _total_value(fronts, picks))


def solve_knapsacks(
    costs: Sequence[Ints], values: Sequence[Floats], budgets: Ints, most_states: int = _MOST_STATES
) -> tuple[list[int], float]:
    """Choose one item of every class within several budgets at once, each with its own costs.

    Args:
        costs: The costs of the items of every class, shape (budgets, items).
        values: Their non-negative values, shape (items,).
        budgets: Largest total costs, shape (budgets,). They have to permit the items with the least costs,
            summed over the budgets.
        most_states: The number of partial solutions above which branch and cut takes over.

    Returns:
        The index of the item of every class, and the proven relative gap between their value and the
        optimum. Branch and cut proves it to about 1e-6.
    """
    picks = [int(np.argmin(value)) for value in values]
    if (_spare(costs, picks, budgets) >= 0).all():
        return picks, 0.0
    picks, multipliers = _relax_all(costs, values, budgets)
    picks = _fill_all(costs, values, picks, _spare(costs, picks, budgets))
    best = _value(values, picks)
    weights = [value + multipliers @ cost for cost, value in zip(costs, values, strict=True)]
    bound = fsum(weight.min() for weight in weights) - float(multipliers @ budgets)
    slack = max(best * _ROUNDING - bound, 0.0)
    reduced = [weight - weight.min() for weight in weights]
    cores = [np.flatnonzero(weight <= slack) for weight in reduced]
    core = [cost[:, items] for cost, items in zip(costs, cores, strict=True)]
    weight = [part[items] for part, items in zip(reduced, cores, strict=True)]
    value = [part[items] for part, items in zip(values, cores, strict=True)]
    found, lowest = _enumerate(core, value, weight, budgets, slack, most_states), float("inf")
    if found is None:
        found, lowest = _branch_and_cut(core, value, budgets, best, bound)
    if found:
        items = [int(part[item]) for part, item in zip(cores, found, strict=True)]
        picks = min(items, picks, key=lambda choice: _value(values, choice))
    best = _value(values, picks)
    return picks, 0.0 if lowest * _ROUNDING >= best else 1 - lowest / best


def _total_cost(fronts: Sequence[Front], picks: Sequence[int]) -> int:
    return sum(int(front.cost[pick]) for front, pick in zip(fronts, picks, strict=True))


def _total_value(fronts: Sequence[Front], picks: Sequence[int]) -> float:
    return fsum(front.value[pick] for front, pick in zip(fronts, picks, strict=True))


def _relax(fronts: Sequence[Front], budget: int) -> tuple[list[int], float]:
    """Minimize value + multiplier · cost at the multiplier where the budget is met.

    Start with a solution within the budget and one beyond it. At the multiplier that gives both the same
    weight, either a third solution weighs less and replaces one of the two, or the multiplier is final.

    Returns:
        The solution within the budget, and a multiplier for which it is optimal.
    """
    sizes = [front.cost.size for front in fronts]
    starts = np.cumsum([0, *sizes[:-1]])
    cost = np.concatenate([front.cost for front in fronts])
    value = np.concatenate([front.value for front in fronts])
    owner = np.repeat(np.arange(len(fronts)), sizes)

    within, beyond = starts, starts + np.array(sizes) - 1
    while True:
        excess = cost[beyond].sum() - cost[within].sum()
        multiplier = (value[within] - value[beyond]).sum() / excess
        weight = value + multiplier * (cost - cost[within][owner])
        least = np.minimum.reduceat(weight, starts)
        # Costs ascend, so the first item at the minimum is the cheapest one.
        hits = np.flatnonzero(weight <= least[owner])
        picked = hits[np.unique(owner[hits], return_index=True)[1]]
        total = cost[picked].sum()
        # No solution lies strictly between the two: without this test a tie would repeat for ever.
        if total <= cost[within].sum() or total >= cost[beyond].sum():
            return [int(i) for i in within - starts], float(multiplier)
        if total <= budget:
            within = picked
        else:
            beyond = picked


def _fill(fronts: Sequence[Front], picks: Sequence[int], spare: int) -> list[int]:
    """Spend the unused budget of a solution: repeat the step that gains most and fits."""
    filled = list(picks)

    def step(i: int) -> tuple[float, int]:
        front, pick = fronts[i], filled[i]
        item = int(np.searchsorted(front.cost, front.cost[pick] + spare, side="right")) - 1
        return float(front.value[pick] - front.value[item]), item

    while True:
        gain, item, i = max((*step(i), -i) for i in range(len(fronts)))
        if gain <= 0:
            return filled
        spare -= int(fronts[-i].cost[item] - fronts[-i].cost[filled[-i]])
        filled[-i] = item


def _program(fronts: Sequence[Front], budget: int, best: float, most_states: int) -> tuple[list[int], float]:
    """The dynamic program over the classes in their order.

    Args:
        fronts: The classes.
        budget: Largest total cost.
        best: Value of a known solution.
        most_states: How many states are carried from one class to the next.

    Returns:
        The items of the best solution found, empty if it found none, and a lower bound on the value of every
        solution that it did not examine (infinite if it examined all).
    """
    lowest = float("inf")
    cost, value = np.zeros(1, dtype=np.int64), np.zeros(1)
    trail: list[tuple[Indices, Indices]] = []
    for front, (costs, values) in zip(fronts, _relaxations(fronts), strict=True):
        cost = (cost[:, None] + front.cost).ravel()
        value = (value[:, None] + front.value).ravel()

        # costs[0] is the least cost of the classes to come: a state above this has no completion.
        kept = np.flatnonzero(cost <= budget - costs[0])
        left = budget - cost[kept]
        bound = value[kept] + np.interp(left, costs, values)
        rounded = value[kept] + values[np.searchsorted(costs, left, side="right") - 1]
        best = float(rounded.min(initial=best))
        near = bound <= best * _ROUNDING
        kept, bound = kept[near], bound[near]
        unbeaten = _unbeaten(cost[kept], value[kept])
        if unbeaten.size > most_states:
            unbeaten = unbeaten[np.argsort(bound[unbeaten], kind="stable")]
            # Bounds ascend: the first dropped state bounds all dropped states.
            lowest = min(lowest, float(bound[unbeaten[most_states]]))
        kept = kept[unbeaten[:most_states]]

        cost, value = cost[kept], value[kept]
        trail.append(np.divmod(kept, front.cost.size))
    return _trace(trail, int(np.lexsort((cost, value))[0])) if cost.size else [], lowest


def _branch_and_cut(
    costs: Sequence[Ints], values: Sequence[Floats], budgets: Ints, scale: float, lowest: float
) -> tuple[list[int], float]:
    """HiGHS on one binary variable per item; the objective is scaled, because HiGHS also has absolute gaps.

    Args:
        costs: The costs of the items of every class, shape (budgets, items).
        values: The values of the items.
        budgets: Largest total costs.
        scale: A positive number of the size of the optimum.
        lowest: A lower bound on the optimum.

    Returns:
        The item of every class, empty if it found none, and a lower bound on the optimum.
    """
    cost, one_each = np.concatenate(costs, axis=1), _one_each(values)
    result = scipy.optimize.milp(
        np.concatenate(values) / scale,
        integrality=np.ones(cost.shape[1], dtype=np.int64),
        bounds=scipy.optimize.Bounds(0, 1),
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(cost, -np.inf, budgets),
        ],
        options={"mip_rel_gap": 0.0, "time_limit": _SECONDS},
    )
    bound = result.mip_dual_bound
    lowest = lowest if bound is None else max(lowest, scale * float(bound))
    if result.x is None:
        return [], lowest
    picks = [int(np.argmax(part)) for part in _by_class(values, result.x)]
    # Checked in integers, because HiGHS tolerates small violations.
    return picks if (_spare(costs, picks, budgets) >= 0).all() else [], lowest


def _relax_all(costs: Sequence[Ints], values: Sequence[Floats], budgets: Ints) -> tuple[list[int], Floats]:
    """The linear relaxation under several budgets.

    Returns:
        A solution within the budgets, and multipliers for which the Lagrangian bound is its value.
    """
    cheapest = [int(np.argmin(cost.sum(axis=0))) for cost in costs]
    units = np.maximum(budgets, 1).astype(np.float64)
    unit = _value(values, cheapest)  # positive, or the best items would have fit
    result = scipy.optimize.linprog(  # type: ignore[call-overload]  # the stubs do not know sparse A_eq
        np.concatenate(values) / unit,
        A_ub=np.concatenate(costs, axis=1) / units[:, None],
        b_ub=budgets / units,
        A_eq=_one_each(values),
        b_eq=np.ones(len(values)),
        method="highs",
    )
    if not result.success:
        return cheapest, np.zeros(budgets.size)
    support = (np.flatnonzero(part > _ROUNDING - 1) for part in _by_class(values, result.x))
    picks = [
        int(items[np.argmin(cost[:, items].sum(axis=0))]) for items, cost in zip(support, costs, strict=True)
    ]
    within = (_spare(costs, picks, budgets) >= 0).all()
    return picks if within else cheapest, np.maximum(-result.ineqlin.marginals, 0) * unit / units


def _fill_all(
    costs: Sequence[Ints], values: Sequence[Floats], picks: Sequence[int], spare: Ints
) -> list[int]:
    """Like `_fill`, under several budgets."""
    filled = list(picks)

    def step(i: int) -> tuple[float, int]:
        fits = (costs[i] - costs[i][:, filled[i], None] <= spare[:, None]).all(axis=0)
        item = int(np.argmin(np.where(fits, values[i], np.inf)))
        return float(values[i][filled[i]] - values[i][item]), item

    while True:
        gain, item, i = max((*step(i), -i) for i in range(len(costs)))
        if gain <= 0:
            return filled
        spare = spare - (costs[-i][:, item] - costs[-i][:, filled[-i]])
        filled[-i] = item


def _enumerate(
    costs: Sequence[Ints],
    values: Sequence[Floats],
    weights: Sequence[Floats],
    budgets: Ints,
    slack: float,
    most_states: int,
) -> list[int] | None:
    """Examine all solutions within the budgets whose weights sum up to at most `slack`.

    Returns:
        The best of them, the cheapest of equals; empty if there is none, None if there are too many.
    """
    rest = sum((cost.min(axis=1) for cost in costs), np.zeros_like(budgets))
    spent, weighed, value = np.zeros((budgets.size, 1), np.int64), np.zeros(1), np.zeros(1)
    trail: list[tuple[Indices, Indices]] = []
    for cost, gain, weight in zip(costs, values, weights, strict=True):
        if budgets.size * weighed.size * weight.size > 64 * most_states:
            return None
        rest = rest - cost.min(axis=1)
        spent = (spent[:, :, None] + cost[:, None, :]).reshape(budgets.size, -1)
        weighed = (weighed[:, None] + weight).ravel()
        value = (value[:, None] + gain).ravel()
        fits = (spent <= (budgets - rest)[:, None]).all(axis=0)
        kept = np.flatnonzero(fits & (weighed <= slack * _ROUNDING))
        if kept.size > most_states:
            return None
        spent, weighed, value = spent[:, kept], weighed[kept], value[kept]
        trail.append(np.divmod(kept, weight.size))
    return _trace(trail, int(np.lexsort((spent.sum(axis=0), value))[0])) if value.size else []


def _spare(costs: Sequence[Ints], picks: Sequence[int], budgets: Ints) -> Ints:
    spent = (cost[:, pick] for cost, pick in zip(costs, picks, strict=True))
    left: Ints = budgets - sum(spent, np.zeros_like(budgets))
    return left


def _value(values: Sequence[Floats], picks: Sequence[int]) -> float:
    return fsum(value[pick] for value, pick in zip(values, picks, strict=True))


def _one_each(values: Sequence[Floats]) -> scipy.sparse.csr_array:
    """One row per class that counts its items."""
    count = sum(value.size for value in values)
    owner = np.repeat(np.arange(len(values)), [value.size for value in values])
    return scipy.sparse.csr_array((np.ones(count), (owner, np.arange(count))), shape=(len(values), count))


def _by_class(values: Sequence[Floats], items: Floats) -> list[Floats]:
    return np.split(items, np.cumsum([value.size for value in values])[:-1])


def _trace(trail: Sequence[tuple[Indices, Indices]], state: int) -> list[int]:
    """The items on the way to a state after the last class."""
    items = []
    for parent, item in reversed(trail):
        items.append(int(item[state]))
        state = int(parent[state])
    return items[::-1]


def _unbeaten(cost: Ints, value: Floats) -> Indices:
    """Indices of the states that no other state equals or beats in both cost and value, by ascending cost."""
    order = np.lexsort((value, cost))
    least = np.minimum.accumulate(value[order])
    first = np.ones(order.size, dtype=bool)
    first[1:] = value[order][1:] < least[:-1]
    return order[first]


def _relaxations(fronts: Sequence[Front]) -> list[tuple[Ints, Floats]]:
    """For every class, the least value of all later classes as a function of their budget.

    The value is that of the linear relaxation: a convex, piecewise linear function, given by its corners.
    Each corner is a choice of whole items.
    """
    first, last = 0, 0.0
    gain, step = np.zeros(0), np.zeros(0, dtype=np.int64)
    corners = []
    for front in reversed(fronts):
        order = np.argsort(-gain / step, kind="stable")
        gain, step = gain[order], step[order]
        costs = first + np.concatenate(([0], np.cumsum(step)))
        # Summed from the last corner, where the values are smallest.
        values = last + np.concatenate((np.cumsum(gain[::-1])[::-1], [0.0]))
        corners.append((costs, values))
        hull = lower_hull(front.cost.tolist(), front.value.tolist())
        first, last = first + int(front.cost[0]), last + float(front.value[-1])
        gain = np.concatenate((gain, -np.diff(front.value[hull])))
        step = np.concatenate((step, np.diff(front.cost[hull])))
    return corners[::-1]


def lower_hull(cost: Sequence[int], value: Sequence[float]) -> list[int]:
    """Indices of the corners of the lower convex hull of points with ascending costs."""
    hull: list[int] = []
    for i in range(len(cost)):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (value[a] - value[b]) * (cost[i] - cost[b]) > (value[b] - value[i]) * (cost[b] - cost[a]):
                break
            hull.pop()
        hull.append(i)
    return hull
