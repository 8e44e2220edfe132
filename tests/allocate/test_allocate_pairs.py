"""Pairs in the plan: the classes give the optimum that all combinations give."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.pairs import Classes, Pair
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
