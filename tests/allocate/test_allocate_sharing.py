"""Groups that share layers in the plan: the classes give the optimum that all combinations give."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest

from onnx_lowrank.allocate import pairs
from onnx_lowrank.allocate.joins import families, joined, joins
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.allocate.pairs import Classes, Pair, Sharing
from onnx_lowrank.allocate.solve import smallest, solve
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents import recipes

RECIPE = recipes.load("activation")


class _Way:
    def __init__(self, way):
        self.way = way

    def lowering(self, fold, k):
        return self.way


def table(name, cost, error, way=Lowering.NATIVE):
    ranks = np.arange(len(cost))
    one = np.where(ranks > 0, 1, 0)
    error = np.round(np.array(error, float), 9)
    return Candidates(name, one - 1, one, ranks, one * 99, np.array(cost), error, tariff=_Way(way))


def drawn(rng, name, keep, number, least=1):
    cost = np.sort(rng.choice(np.arange(least, keep), number, replace=False))
    return table(name, [keep, *cost], [0.0, *np.sort(rng.random(number))[::-1]])


def sharing(rng, members, number, keep):
    """Tables whose costs at one index sum to less than those of the kept layers."""
    tables = []
    for place, member in enumerate(members):
        cost = np.arange(1, number + 1) * (7 if place == 0 else 3)
        error = np.sort(rng.random(number))[::-1]
        tables.append(table(f"w{member}", [keep, *cost], [0.0, *error], Lowering.SHARED))
    return Sharing(tuple(tables), members)


def gated(rng):
    """Gate and up (1, 2) share an input and are the producers of a narrowed layer (3)."""
    layers = tuple(drawn(rng, f"w{n}", 40, 4) for n in range(5))
    cost = np.sort(rng.choice(np.arange(-60, 40), 4, replace=False))
    narrow = table("w3", [40, *cost], [0.0, *np.sort(rng.random(4))[::-1]], Lowering.NARROW)
    shares = [np.array([40, *rng.integers(1, 40, 4)]) for _ in range(2)]
    own = narrow.cost + sum(40 - share for share in shares)
    pair = Pair(narrow, (1, 2, 3), (*shares, own), (narrow.j, narrow.j))
    return layers, (pair, sharing(rng, (1, 2), 5, 40))


def attention(rng):
    """Three layers that share an input, and two others."""
    layers = tuple(drawn(rng, f"w{n}", 40, 4) for n in range(5))
    return layers, (sharing(rng, (0, 1, 3), 5, 40),)


def subsets(rng):
    """Every set of three layers."""
    layers = tuple(drawn(rng, f"w{n}", 40, 4) for n in range(4))
    return layers, tuple(sharing(rng, members, 5, 40) for members in joins((0, 1, 2)))


def partitions(rng):
    """Every set of four layers, so also two sets at once."""
    layers = tuple(drawn(rng, f"w{n}", 40, 2) for n in range(4))
    return layers, tuple(sharing(rng, members, 3, 40) for members in joins((0, 1, 2, 3)))


def chain(rng):
    """Three groups of a cluster; the first and the last can be taken together."""
    layers = tuple(drawn(rng, f"w{n}", 30, 3) for n in range(5))
    return layers, (sharing(rng, (0, 1), 4, 30), sharing(rng, (1, 3), 4, 30), sharing(rng, (2, 3, 4), 3, 30))


def parallel(rng):
    """The layers of a sum (1, 4) are also in a pair and in a group that shares an encoder."""
    layers, groups = gated(rng)
    added = sharing(rng, (1, 4), 5, 40)
    return layers, (*groups, replace(added, is_sum=True))


def brute(layers, groups):
    """All plans: (cost, errors)."""
    for count in range(len(groups) + 1):
        for taken in combinations(groups, count):
            members = [m for group in taken for m in group.members]
            if len(set(members)) < len(members):
                continue
            rest = [n for n in range(len(layers)) if n not in members]
            sizes = [range(1, max(t.cost.size for t in group.tables if t is not None)) for group in taken]
            for picks in product(*sizes, *(range(layers[n].cost.size) for n in rest)):
                cost, errors = 0, []
                for group, pick in zip(taken, picks, strict=False):
                    for member, t in zip(group.members, group.tables, strict=True):
                        cost += int(layers[member].cost[0] if t is None else t.cost[pick])
                        errors.append(0.0 if t is None else float(t.error[pick]))
                for n, pick in zip(rest, picks[count:], strict=True):
                    cost += int(layers[n].cost[pick])
                    errors.append(float(layers[n].error[pick]))
                yield cost, errors


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", [gated, attention, subsets, partitions, chain, parallel])
@pytest.mark.parametrize(("aggregate", "power"), [("sum", 1.0), ("sum", 3.0), ("max", 1.0)])
def test_no_combination_beats_the_plan(seed, kind, aggregate, power):
    layers, groups = kind(np.random.default_rng(seed))
    recipe = replace(RECIPE, aggregate=Aggregate(aggregate), power=power)
    classes = Classes(layers, groups, recipe)
    every = list(brute(layers, groups))
    combine = max if aggregate == "max" else (lambda errors: sum(e**power for e in errors))
    for budget in (40, 70, 100, 130):
        limits = classes.limits(Limits.single(layers, budget))
        fits = [combine(errors) for cost, errors in every if cost <= budget]
        if not fits:
            assert limits.excess(smallest(classes.tables, limits, recipe).picks) > 0
            continue
        solution = solve(classes.tables, limits, recipe)
        choices = classes.choices(solution.picks)
        assert [choice.layer for choice in choices] == [t.layer for t in layers]
        assert sum(choice.cost for choice in choices) == solution.cost <= budget
        value = combine([choice.error for choice in choices])
        assert value == pytest.approx(min(fits), rel=1e-9, abs=1e-12)
        assert solution.objective == pytest.approx(value, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("number", "sets"), [(2, 1), (3, 4), (4, 11), (5, 1)])
def test_few_siblings_may_share_in_every_set(number, sets):
    names = tuple(f"w{n}" for n in range(number))
    found = joins(names)
    assert len(set(found)) == len(found) == sets
    assert names in found
    assert all(len(each) > 1 and list(each) == sorted(each) for each in found)


def test_a_family_is_counted_once():
    alone = Layer("w", "MatMul", 4, 4, (), 1, "float32", (Fold.ENCODE,), (1,), ())
    names = ("w0", "w1", "w2")
    layers = [replace(alone, id=name, siblings=names) for name in names]
    assert families([*layers, alone]) == (names,)


def test_many_siblings_share_in_the_sets_of_a_tree():
    """The outputs of w0 and w3 are most alike, then those of w1 and w4; w2 is like none."""
    likeness = np.full((5, 5), 0.1) + 0.9 * np.eye(5)
    likeness[0, 3] = likeness[3, 0] = 0.9
    likeness[1, 4] = likeness[4, 1] = 0.8
    likeness[2] = likeness[:, 2] = 0.0
    names = tuple(f"w{n}" for n in range(5))
    assert joins(names, likeness) == (names, ("w0", "w1", "w3", "w4"), ("w1", "w4"), ("w0", "w3"))


@pytest.mark.parametrize("number", [5, 8, 9, 40])
def test_the_sets_of_many_siblings_are_few_and_nested_or_apart(number):
    rng = np.random.default_rng(number)
    likeness = rng.random((number, number))
    names = tuple(f"w{n:02}" for n in range(number))
    found = joins(names, (likeness + likeness.T) / 2)
    assert len(set(found)) == len(found) == min(number - 1, 7)
    assert names == found[0]
    for one, other in combinations([set(each) for each in found], 2):
        assert one > other or not one & other
    assert all(list(each) == sorted(each) for each in found)


def test_a_shared_group_has_one_rank():
    layers, groups = attention(np.random.default_rng(1))
    cheap = tuple(replace(t, error=t.error * 1e-6) for t in groups[0].tables)
    classes = Classes(layers, (Sharing(cheap, groups[0].members),), RECIPE)
    limits = classes.limits(Limits.single(layers, 140))
    choices = classes.choices(solve(classes.tables, limits, RECIPE).picks)
    options = [choices[m].option for m in groups[0].members]
    assert {option.lowering for option in options} == {Lowering.SHARED}
    assert len(set(options)) == 1


def test_several_constraints_bound_the_classes():
    layers, groups = gated(np.random.default_rng(3))
    classes = Classes(layers, groups, RECIPE)
    costs = tuple(np.stack([t.cost, 2 * t.cost]) for t in layers)
    limits = classes.limits(Limits(np.array([120, 200]), costs))
    assert [cost.shape for cost in limits.costs] == [(2, t.cost.size) for t in classes.tables]
    for table_, cost in zip(classes.tables, limits.costs, strict=True):
        np.testing.assert_array_equal(cost[0], table_.cost)


@pytest.mark.parametrize("name", ["_MOST_WAYS", "_MOST_COMBINATIONS"])
def test_large_clusters_stay_apart(monkeypatch, name):
    layers, groups = chain(np.random.default_rng(2))
    monkeypatch.setattr(pairs, name, 1)
    classes = Classes(layers, groups, RECIPE)
    budget = 100
    limits = classes.limits(Limits.single(layers, budget))
    solution = solve(classes.tables, limits, RECIPE)
    best = min(sum(errors) for cost, errors in brute(layers, ()) if cost <= budget)
    assert sum(c.error for c in classes.choices(solution.picks)) == pytest.approx(best, rel=1e-9)


def test_a_cluster_that_is_too_large_loses_its_sums_first(monkeypatch):
    layers, groups = parallel(np.random.default_rng(4))

    def tables(chosen, limit):
        monkeypatch.setattr(pairs, "_MOST_COMBINATIONS", limit)
        return [(t.layer, list(t.cost), list(t.error)) for t in Classes(layers, chosen, RECIPE).tables]

    # The least limit with which the other groups are there.
    limit = next(n for n in range(1, 4**5) if len(tables(groups[:-1], n)) < len(layers))
    assert tables(groups, limit) == tables(groups[:-1], limit)
    assert len(tables(groups, 4**7)) < len(tables(groups, limit))
    assert len(tables(groups, limit - 1)) == len(layers)


def test_the_layers_of_a_sum_share_all_together():
    names = ("w0", "w1", "w2")
    layer = Layer("w0", "MatMul", 4, 4, (), 1, "float32", (Fold.ENCODE,), (1,), (), addends=names)
    layers = [replace(layer, id=name) for name in names]
    other = replace(layer, id="other", addends=())
    assert joined([other, *layers], [Lowering.SUMMED]) == ((Lowering.SUMMED, names),)
    assert joined(layers, [Lowering.SHARED]) == ()
    siblings = ("w0", "w3")
    both = [replace(each, siblings=siblings if each.id in siblings else ()) for each in layers]
    shared, summed = (Lowering.SHARED, siblings), (Lowering.SUMMED, names)
    assert joined(both, [Lowering.SUMMED, Lowering.SHARED]) == (shared, summed)
    assert joined(both, [Lowering.SHARED]) == (shared,)
