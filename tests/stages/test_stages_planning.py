"""Plans under MACs where models branch and call functions."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import fsum

import numpy as np
import pytest

from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets import macs as counting
from onnx_lowrank.budgets import registry
from onnx_lowrank.budgets.macs import model_macs
from onnx_lowrank.core.plan import Choice
from onnx_lowrank.documents import recipes
from onnx_lowrank.errors import BudgetError, InputError
from onnx_lowrank.files.load import load
from onnx_lowrank.layers.found import find_layers
from onnx_lowrank.linalg.backend import resolve
from onnx_lowrank.progress import Silent
from onnx_lowrank.stages import planning
from onnx_lowrank.stages.planning import Goal, check_reach, make
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.work.executor import Threads
from rewriting import model

THREADS = Threads(resolve("cpu"))
RECIPES = [recipe for recipe in recipes.load_all() if recipe.price is None and not recipe.calibrated]
IF = """g (bool b, float[4,{n}] x) => (float[4,{n}] y) {{ h = {before} (x{and_w})
    y = If (b) <then_branch = t () => (float[4,{n}] p) {{ k = MatMul (h, a) p = MatMul (k, b1) }},
                else_branch = e () => (float[4,{n}] q) {{ q = MatMul (h, c) }}> }}"""


def decaying(seed, n, power=0.5):
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((n, n)))[0] for _ in range(2))
    return ((u * np.arange(1, n + 1) ** -power) @ v).astype(np.float32)


def branching(n=8, main=False, power=0.5):
    names = ("a", "b1", "c", *(["w"] if main else []))
    weights = {name: decaying(seed, n, power) for seed, name in enumerate(names)}
    text = IF.format(n=n, before="MatMul" if main else "Relu", and_w=", w" if main else "")
    return model(text, **weights)


def found(proto):
    return find_layers(load(proto), {}, (), ())


def grid(seen, budget="macs"):
    return Grid(registry.named(budget).on(seen))


def scores(seen, budget="macs"):
    prices = {"prices": lambda name: registry.named(name).on(seen)}
    return Scores(seen.model, seen.walk, seen.bindings, grid(seen, budget), THREADS, Silent(), **prices)


def planned(seen, ratio, recipe, budget="macs"):
    return make(seen.model, Goal(ratio, recipe), scores(seen, budget), Silent())


def all_plans(seen, recipe):
    """(total MACs, errors) of every choice of candidates."""
    tables = scores(seen).candidates(recipe)
    for picks in product(*(range(table.cost.size) for table in tables)):
        pairs = list(zip(tables, picks, strict=True))
        choices = [Choice(t.layer, t.option(n), int(t.cost[n]), float(t.error[n])) for t, n in pairs]
        yield model_macs(seen, choices), [choice.error for choice in choices]


def test_what_the_cheaper_branch_keeps_costs_nothing():
    plan = planned(found(branching(64)), 0.9, recipes.load("schatten"))
    options = {choice.layer.rpartition("/")[2]: choice.option for choice in plan.choices}
    assert options["c"] is None
    assert any(options.values())


@pytest.mark.parametrize("main", [False, True])
@pytest.mark.parametrize("ratio", [0.95, 0.8, 0.6, 0.4])
@pytest.mark.parametrize("name", ["schatten", "alds"])
def test_plans_over_branches_are_optimal(name, ratio, main):
    recipe, seen = recipes.load(name), found(branching(main=main))
    result = planned(seen, ratio, recipe)
    total = model_macs(seen)
    assert model_macs(seen, result.choices) <= ratio * total
    largest = name == "alds"
    worth = [
        max(errors) if largest else fsum(error**recipe.power for error in errors)
        for macs, errors in all_plans(seen, recipe)
        if macs <= ratio * total
    ]
    assert result.solver.objective == pytest.approx(min(worth), rel=1e-12)
    assert result.solver.gap == 0


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_smallest_ratio_is_the_smallest(recipe):
    seen = found(branching(main=True))
    with pytest.raises(BudgetError) as caught:
        planned(seen, 0.01, recipe)
    least = min(macs for macs, _ in all_plans(seen, recipe)) / model_macs(seen)
    assert least <= caught.value.smallest_ratio < least + 0.001
    assert model_macs(seen, planned(seen, caught.value.smallest_ratio, recipe).choices) == least * model_macs(
        seen
    )


@pytest.mark.parametrize("routes", [1, 2])
@pytest.mark.parametrize("ratio", [0.95, 0.6, 0.4])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_too_many_routes_leave_a_true_gap(monkeypatch, recipe, ratio, routes):
    seen = found(branching())
    best = planned(seen, ratio, recipe).solver
    monkeypatch.setattr(counting, "_MOST_ROUTES", routes)
    result = planned(seen, ratio, recipe)
    assert model_macs(seen, result.choices) <= ratio * model_macs(seen)
    if best.gap is None:
        assert result.solver.gap is None
    else:
        assert result.solver.objective * (1 - result.solver.gap) <= best.objective * (1 + 1e-12)
        assert best.objective <= result.solver.objective * (1 + 1e-12)


def test_what_follows_a_rule_has_no_gap():
    seen = found(branching())
    assert planned(seen, 0.6, recipes.load("svd")).solver.gap is None
    assert planned(seen, 0.6, recipes.load("l-rank"), "params").solver.gap is None


# --- functions --------------------------------------------------------------------------------------

FUNCTION = """<domain: "local", opset_import: ["" : 17]> F (a) => (c)
    {{ w = Constant <value = float[2,2] {{1.0, 2.0, 3.0, 5.0}}> () c = {node} }}"""


def calling(calls, node="MatMul (a, w)"):
    applied = " ".join(f"h{i + 1} = local.F (h{i})" for i in range(calls))
    text = f"g (float[4,8] x) => (float[4,8] y) {{ h0 = MatMul (x, v) {applied} y = Relu (h{calls}) }}"
    return model(text, functions=FUNCTION.format(node=node), v=decaying(0, 8))


def test_a_function_that_nothing_calls_does_not_stop_a_plan():
    seen = found(calling(0))
    assert model_macs(seen) == 4 * 64
    result = planned(seen, 0.6, recipes.load("schatten"))
    assert model_macs(seen, result.choices) <= 0.6 * 256


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (model("g (float[N,8] x) => (float[N,8] y) { y = MatMul (x, w) }", w=(8, 8)), "its inputs x have"),
        (calling(1), r"the shapes at node 'c' in local:F do not follow"),
        (
            model(
                "g (float[4,8] x) => (float[4,8] y) { h = local.G (x) k = MatMul (h, w) y = Relu (k) }",
                w=(8, 8),
            ),
            "the shapes at node",
        ),
    ],
)
def test_unknown_macs_name_their_cause(proto, words):
    with pytest.raises(InputError, match=f"^The model's MACs are unknown because .*{words}"):
        _ = grid(found(proto)).costs.total


@pytest.mark.parametrize(
    ("ratio", "total", "limit"),
    [
        (0.3, 10, 3),
        (0.29, 100, 29),
        (0.1, 10**30, 10**29),
        (0.5, 2 * 10**12, 10**12),
        (0.5, 2 * 10**18 + 1, 10**18),
        (1 / 3, 3, 0),
        (1e-05, 99_999, 0),
        (1, 7, 7),
    ],
)
def test_a_ratio_is_a_bound_to_the_last_unit(ratio, total, limit):
    assert planning.largest_total(ratio, total) == limit


@pytest.mark.parametrize("budget", ["params", "macs"])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_what_is_in_reach_is_known_before_any_error_is(recipe, budget):
    """The check and the plan draw the line at the same ratio."""
    seen = found(branching(main=True))
    with pytest.raises(BudgetError) as caught:
        planned(seen, 1e-9, recipe, budget)
    with pytest.raises(BudgetError) as early:
        check_reach(seen.model, seen.layers, 1e-9, [recipe], grid(seen, budget))
    assert (str(early.value), early.value.smallest_ratio) == (str(caught.value), caught.value.smallest_ratio)
    check_reach(seen.model, seen.layers, early.value.smallest_ratio, [recipe], grid(seen, budget))
    planned(seen, early.value.smallest_ratio, recipe, budget)


def test_one_recipe_that_reaches_the_ratio_is_enough():
    seen = found(branching())
    near = recipes.load("schatten")
    far = replace(near, groups=(8,))
    with pytest.raises(BudgetError):
        check_reach(seen.model, seen.layers, 0.3, [far], grid(seen, "params"))
    check_reach(seen.model, seen.layers, 0.3, [far, near], grid(seen, "params"))


def test_a_recipe_with_a_price_of_its_own_is_not_refused_early():
    priced = replace(recipes.load("schatten"), price="macs")
    seen = found(branching())
    check_reach(seen.model, seen.layers, 1e-9, [priced], grid(seen, "params"))


# --- counts beyond what the allocation computes with ------------------------------------------------


def many(rows):
    """A layer that many rows of its input meet."""
    text = "g (float[N,64] x) => (float[N,64] y) { h = MatMul (x, w) y = MatMul (h, v) }"
    proto = model(text, w=decaying(0, 64), v=decaying(1, 64))
    return find_layers(load(proto), {"x": (rows, 64)}, (), ())


@pytest.mark.parametrize("rows", [2**48, 2**49, 2**52, 2**62])
def test_macs_beyond_the_largest_are_refused_with_the_layer(rows):
    seen = many(rows)
    assert model_macs(seen) == 2 * 64 * 64 * rows
    asks = (
        lambda: check_reach(seen.model, seen.layers, 0.5, RECIPES, grid(seen)),
        lambda: planned(seen, 0.5, RECIPES[0]),
    )
    for ask in asks:
        with pytest.raises(
            InputError, match=r"^The MACs of .*'w'.* --input-shape, or choose --budget params\."
        ):
            ask()


def test_macs_up_to_the_largest_are_planned():
    seen = many(2**46)
    assert 0.4 < model_macs(seen, planned(seen, 0.5, recipes.load("schatten")).choices) / 2**59 <= 0.5


def test_params_do_not_care_how_large_the_macs_are():
    seen = many(2**62)
    planned(seen, 0.5, recipes.load("schatten"), "params")
    with pytest.raises(InputError, match=r"^The MACs of layer 'w' are 18,"):
        planned(seen, 0.5, recipes.load("l-rank"), "params")
