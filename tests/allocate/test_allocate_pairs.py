"""Pairs in the plan: the classes give the optimum that all combinations give."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.pairs import Bound, Classes, Pair
from onnx_lowrank.allocate.solve import smallest, solve
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents import recipes

RECIPE = recipes.load("activation")


class _Narrow:
    def lowering(self, fold, k):
        return Lowering.NARROW


def table(name, cost, error, tariff=None):
    """Candidates with the costs of options by rank; the first entry keeps the layer."""
    ranks = np.arange(len(cost))
    one = np.where(ranks > 0, 1, 0)
    return Candidates(
        name, one - 1, one, ranks, one * 99, np.array(cost), np.array(error, float), tariff=tariff
    )


def random_table(rng, name, keep, number, tariff=None):
    cost = np.sort(rng.choice(np.arange(1, keep), number, replace=False))
    error = np.sort(rng.random(number))[::-1]
    return table(name, [keep, *cost], [0.0, *error], tariff)


def problem(seed):
    rng = np.random.default_rng(seed)
    layers = tuple(random_table(rng, f"w{n}", 40, 5) for n in range(5))
    # The narrowings' costs are those of the consumer, less what the producers save.
    cost = np.sort(rng.choice(np.arange(-60, 40), 6, replace=False))
    narrow = table("w3", [40, *cost], [0.0, *np.sort(rng.random(6))[::-1]], _Narrow())
    shares = [np.array([40, *rng.integers(1, 40, 6)]) for _ in range(2)]
    own = narrow.cost + sum(40 - share for share in shares)
    return layers, Pair(narrow, (1, 2, 3), (*shares, own), (narrow.j, 2 * narrow.j))


def combinations(layers, pair):
    """All plans: (cost, errors, options by layer)."""
    for picks in product(*(range(t.cost.size) for t in layers)):
        yield (
            sum(int(t.cost[p]) for t, p in zip(layers, picks, strict=True)),
            [float(t.error[p]) for t, p in zip(layers, picks, strict=True)],
        )
    rest = [n for n in range(len(layers)) if n not in pair.members]
    for index in range(1, pair.table.cost.size):
        for picks in product(*(range(layers[n].cost.size) for n in rest)):
            kept = sum(int(layers[n].cost[0]) for n in pair.members[:-1])
            cost = kept + int(pair.table.cost[index])
            cost += sum(int(layers[n].cost[p]) for n, p in zip(rest, picks, strict=True))
            yield (
                cost,
                [float(pair.table.error[index])]
                + [float(layers[n].error[p]) for n, p in zip(rest, picks, strict=True)],
            )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("aggregate", [Aggregate.SUM, Aggregate.MAX])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_no_combination_beats_the_plan(seed, aggregate, power):
    layers, pair = problem(seed)
    recipe = replace(RECIPE, aggregate=aggregate, power=power)
    classes = Classes(layers, (pair,), recipe)
    budget = 70 + 8 * seed
    limits = classes.limits(Limits.single(layers, budget))
    if (
        smallest(classes.tables, limits, recipe) is None
        or limits.excess(smallest(classes.tables, limits, recipe).picks) > 0
    ):
        assert all(cost > budget for cost, _ in combinations(layers, pair))
        return
    solution = solve(classes.tables, limits, recipe)
    choices = classes.choices(solution.picks)
    assert [choice.layer for choice in choices] == [t.layer for t in layers]
    assert sum(choice.cost for choice in choices) == solution.cost <= budget
    errors = [choice.error for choice in choices]
    value = max(errors) if aggregate is Aggregate.MAX else sum(e**power for e in errors)
    assert solution.objective == pytest.approx(value, rel=1e-9)
    combine = max if aggregate is Aggregate.MAX else (lambda errors: sum(e**power for e in errors))
    best = min(combine(e) for cost, e in combinations(layers, pair) if cost <= budget)
    assert value == pytest.approx(best, rel=1e-9)


def test_a_narrowed_pair_keeps_its_producers_and_says_so():
    layers, pair = problem(1)
    pair = replace(pair, table=replace(pair.table, error=pair.table.error * 1e-6))
    classes = Classes(layers, (pair,), RECIPE)
    limits = classes.limits(Limits.single(layers, 150))
    choices = classes.choices(solve(classes.tables, limits, RECIPE).picks)
    assert choices[3].option.lowering is Lowering.NARROW
    for member in (1, 2):
        assert choices[member].option is None
        assert choices[member].reason == f"narrowed to {member * choices[3].option.j} channels with w3"
    for member in (1, 2, 3):
        assert choices[member].cost == pair.shares[member - 1][choices[3].option.j]


def test_without_pairs_the_classes_are_the_layers():
    layers, _ = problem(2)
    classes = Classes(layers, (), RECIPE)
    limits = Limits.single(layers, 100)
    assert classes.tables == layers
    assert classes.limits(limits) is limits


def test_several_constraints_bound_the_classes():
    layers, pair = problem(3)
    classes = Classes(layers, (pair,), RECIPE)
    single = Limits.single(layers, 140)
    double = Limits(np.array([140, 9999]), tuple(np.concatenate([c, 2 * c]) for c in single.costs))
    made = classes.limits(double)
    assert [costs.shape[0] for costs in made.costs] == [2] * len(classes.tables)
    picks = solve(classes.tables, classes.limits(single), RECIPE).picks
    assert made.excess(picks) <= 0


def packed(seed, *, bound):
    """A packed matrix w1 with queries and keys of its own, and the layer w2 that reads its values."""
    rng = np.random.default_rng(seed)
    layers = tuple(random_table(rng, f"w{n}", 40, 4) for n in range(4))
    drops = [np.sort(rng.choice(np.arange(1, 18), 5, replace=False))[::-1] for _ in range(3)]
    errors = [np.sort(rng.random(5))[::-1] for _ in range(2)]
    own = table("w1", [40, *(40 - drops[0])], [0.0, *errors[0]], _Narrow())
    behind = table("w2", [40, *(40 - drops[1] - drops[2])], [0.0, *errors[1]], _Narrow())
    shares = [np.array([40, *(40 - drop)]) for drop in drops]
    scores = Pair(own, (1,), (shares[0],), (), {1: frozenset({0, 8})}, "w2" if bound else "")
    values = Pair(
        behind, (1, 2), (shares[1], shares[2]), (behind.j,), {1: frozenset({16})}, "w1" if bound else ""
    )
    return layers, scores, values


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("aggregate", [Aggregate.SUM, Aggregate.MAX])
def test_pairs_of_a_packed_matrix_are_chosen_as_well_as_any_plan(seed, bound, aggregate):
    layers, scores, values = packed(seed, bound=bound)
    recipe = replace(RECIPE, aggregate=aggregate, power=1.0)
    groups = (Bound((scores, values)),) if bound else (scores, values)
    classes = Classes(layers, groups, recipe)
    budget = 75 + 4 * seed
    limits = classes.limits(Limits.single(layers, budget))
    solution = solve(classes.tables, limits, recipe)
    choices = classes.choices(solution.picks)
    assert [choice.layer for choice in choices] == [t.layer for t in layers]
    assert sum(choice.cost for choice in choices) == solution.cost <= budget
    narrow = [choice.option is not None and choice.option.lowering is Lowering.NARROW for choice in choices]
    if bound:
        assert narrow[1] == narrow[2]
        assert not narrow[1] or choices[1].option.j == choices[2].option.j
    combine = max if aggregate is Aggregate.MAX else sum
    best = np.inf
    for first, last in product(range(layers[0].cost.size), range(layers[3].cost.size)):
        ends = int(layers[0].cost[first] + layers[3].cost[last])
        rest = [float(layers[0].error[first]), float(layers[3].error[last])]
        plans = [
            (int(layers[1].cost[p] + layers[2].cost[q]), [layers[1].error[p], layers[2].error[q]])
            for p, q in product(range(layers[1].cost.size), range(layers[2].cost.size))
        ]
        taken = [(n, n) for n in range(1, 6)] if bound else [*product(range(6), repeat=2)]
        for p, q in taken:
            cost = int(scores.table.cost[p] + values.table.cost[q])
            plans.append((cost, [scores.table.error[p], values.table.error[q]]))
        if not bound:
            # The values' narrowing keeps w1's own queries and keys; the queries' leaves w2 any option.
            plans += [
                (int(scores.table.cost[p] + layers[2].cost[q]), [scores.table.error[p], layers[2].error[q]])
                for p, q in product(range(6), range(layers[2].cost.size))
            ]
        best = min([best, *(combine([*rest, *errors]) for cost, errors in plans if ends + cost <= budget)])
    value = combine(choice.error for choice in choices)
    assert value == pytest.approx(best, rel=1e-9)


def test_a_packed_matrix_has_an_option_and_a_partner():
    layers, scores, values = packed(1, bound=False)
    tiny = [
        replace(pair, table=replace(pair.table, error=pair.table.error * 1e-6)) for pair in (scores, values)
    ]
    classes = Classes(layers, tuple(tiny), RECIPE)
    limits = classes.limits(Limits.single(layers, 130))
    choices = classes.choices(solve(classes.tables, limits, RECIPE).picks)
    assert {choice.option.lowering for choice in choices[1:3]} == {Lowering.NARROW}
    first, second = (choice.option.j for choice in choices[1:3])
    assert choices[1].cost == scores.shares[0][first] + values.shares[0][second] - 40
    assert choices[1].reason == ""
