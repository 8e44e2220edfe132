"""Planning: the candidates of every layer -> one choice for every layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from onnx_lowrank.allocate.cost import cost
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.limits import Limits, macs_limits
from onnx_lowrank.allocate.options import Candidates, unscored
from onnx_lowrank.allocate.solve import Solution, smallest, solve
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.plan import Aggregate, Budget, Choice, Plan, Solver
from onnx_lowrank.documents import plans
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError, InputError
from onnx_lowrank.layers.found import Found
from onnx_lowrank.logs import DETAIL, some
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages.score import Scores

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan is made for: a ratio of a budget, by a recipe.

    Attributes:
        ratio: The ratio asked for.
        recipe: The recipe.
        budget: What the ratio counts.
        total: What the input model costs where that is measured: its time in nanoseconds.
    """

    ratio: float
    recipe: Recipe
    budget: Budget
    total: int | None = None


def replay(plan: Plan, found: Found) -> Plan:
    """Take over a plan that was made before; an edited one in graph order and at its true costs.

    Raises:
        PlanError: It does not fit the model.
        InputError: It counts MACs, and these are unknown.
    """
    plans.check(plan, found.model.sha256, found.layers)
    by_id = {choice.layer: choice for choice in plan.choices}
    if plan.budget is Budget.LATENCY:
        if not plans.is_edited(plan):
            return plan
        # Nothing tells which of the times, and of the errors, are still those of the options.
        ordered = (by_id[layer.id] for layer in found.layers)
        return _edited(
            plan, [replace(choice, error=math.nan if choice.option else 0.0) for choice in ordered]
        )
    found.total(plan.budget)
    choices = tuple(_repriced(by_id[layer.id], layer, plan.budget) for layer in found.layers)
    # Other positions (--input-shape) make other costs, under which another plan may be the best.
    priced = [choice.cost for choice in plan.choices] == [choice.cost for choice in choices]
    if priced and not plans.is_edited(plan):
        return plan
    return _edited(plan, choices)


def _edited(plan: Plan, choices: Sequence[Choice]) -> Plan:
    """A plan of other choices than it was made with, of which nothing is proven."""
    reasoned = tuple(
        replace(choice, reason="" if choice.option else "the replayed plan keeps it") for choice in choices
    )
    return plans.sealed(replace(plan, choices=reasoned, solver=None))


def _repriced(choice: Choice, layer: Layer, budget: Budget) -> Choice:
    """A choice with its true cost; where that is another, the option was edited and its error is unknown."""
    true = cost(layer, choice.option, budget)
    error = 0.0 if choice.option is None else choice.error if choice.cost == true else math.nan
    return replace(choice, cost=true, error=error)


def check_shapes(found: Found) -> None:
    """Find out whether times can be measured: where all shapes are known.

    Raises:
        InputError: Dimensions of inputs are open.
    """
    if found.open_inputs and found.macs() is None:
        raise InputError(
            f"Times are those of one shape, and dimensions of the inputs {', '.join(found.open_inputs)} "
            "are open: pass them as --input-shape NAME=1,3,224,224, or choose --budget params."
        )


def check_reach(found: Found, ratio: float, recipes: Sequence[Recipe], grid: Grid) -> None:
    """Find out whether a ratio is in reach before any error is computed: that takes costs alone.

    Times are not known before they are measured, so nothing is found out of those.

    Args:
        found: The model.
        ratio: The ratio asked for.
        recipes: The recipes, of which one is enough.
        grid: The ranks to choose from, and what the ratio counts.

    Raises:
        BudgetError: None of them reaches it; the error is the one that comes closest.
        InputError: MACs are needed and unknown.
    """
    budget = grid.budget
    if budget is Budget.LATENCY:
        return
    limit = largest_total(ratio, found.total(budget))
    errors = []
    for recipe in recipes:
        if recipe.price not in (None, budget):
            return  # what such a recipe reaches depends on the errors
        goal = Goal(ratio, recipe, budget)
        tables = [unscored(layer, recipe, grid) for layer in found.layers]
        choices = _choices(tables, _within(found, tables, goal, limit, smallest))
        least = found.total(budget, choices)
        if least <= limit and (found.bindings or ratio == 1):
            return
        errors.append(_out_of_reach(found, goal, least))
    raise min(errors, key=lambda error: error.smallest_ratio or 1.0)


def make(found: Found, goal: Goal, scores: Scores, progress: Progress) -> Plan:
    """Make the best plan for a goal.

    Args:
        found: The model.
        goal: What the plan is made for.
        scores: The errors of the options of its layers, in the goal's budget.
        progress: Where to show progress.

    Raises:
        BudgetError: The ratio cannot be reached.
        InputError: MACs are needed and unknown.
    """
    tables = scores.candidates(goal.recipe)
    if scores.latency is not None:
        goal = replace(goal, total=scores.latency.whole)
    with progress.stage("plan"):
        solution = _solved(found, tables, goal)
    recipe = goal.recipe
    reasons = _reasons(tables, solution, recipe, goal.budget)
    _log_plan(goal, tables, solution, reasons)
    plan = Plan(
        model=found.model.sha256,
        recipe=recipe.name,
        measure=recipe.measure,
        ratio=goal.ratio,
        budget=goal.budget,
        choices=tuple(
            replace(choice, reason=reasons.get(choice.layer, "")) for choice in _choices(tables, solution)
        ),
        solver=Solver(recipe.aggregate, recipe.power, solution.objective, solution.gap),
        factors=recipe.factors,
        recover=recipe.recover,
    )
    return plans.sealed(plan)


def _log_plan(
    goal: Goal, tables: Sequence[Candidates], solution: Solution, reasons: Mapping[str, str]
) -> None:
    if not _log.isEnabledFor(logging.DEBUG):
        return
    _log.debug(
        "recipe %r rewrites %d of %d layers for ratio %g of %s: objective %g, gap %s",
        goal.recipe.name,
        sum(pick > 0 for pick in solution.picks),
        len(tables),
        goal.ratio,
        goal.budget,
        solution.objective,
        "unknown" if solution.gap is None else f"{solution.gap:g}",
    )
    kept: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        kept.setdefault(reason, []).append(layer)
    for reason, layers in kept.items():
        _log.debug("kept %d: %s (%s)", len(layers), reason, some(layers))
    for table, choice in zip(tables, _choices(tables, solution), strict=True):
        chosen, count = choice.option or "kept", table.cost.size - 1
        _log.log(DETAIL, "%r of %d options: %s, cost %d", choice.layer, count, chosen, choice.cost)


def _solved(found: Found, tables: Sequence[Candidates], goal: Goal) -> Solution:
    """The best plan whose whole model stays within the ratio.

    Raises:
        BudgetError: There is none; the error knows the smallest ratio that there is.
    """
    limit = largest_total(goal.ratio, _total(found, goal))
    try:
        return _within(found, tables, goal, limit, solve)
    except BudgetError:
        choices = _choices(tables, _within(found, tables, goal, limit, smallest))
    if goal.total is None:
        raise _out_of_reach(found, goal, found.total(goal.budget, choices))
    saved = sum(int(table.cost[0]) - choice.cost for table, choice in zip(tables, choices, strict=True))
    raise _out_of_reach(found, goal, goal.total - saved)


def _total(found: Found, goal: Goal) -> int:
    """What the input model costs."""
    return found.total(goal.budget) if goal.total is None else goal.total


def _out_of_reach(found: Found, goal: Goal, least: int) -> BudgetError:
    """What to say where the least total of a recipe is above the ratio."""
    if not found.bindings:
        return BudgetError(
            f"{found.model.name} has no layer that can be decomposed, so the smallest ratio that can be "
            "reached is 1: --ratio 1 --dry-run lists every operator with the reason.",
            1.0,
        )
    shown = math.ceil(least / _total(found, goal) * 1000) / 1000
    return BudgetError(
        f"The ratio {goal.ratio:g} of {goal.budget} cannot be reached for {found.model.name}: the smallest "
        f"with recipe {goal.recipe.name!r} is {shown:g}.",
        shown,
    )


def largest_total(ratio: float, total: int) -> int:
    """The largest whole number within a ratio of another: exact, for the ratio as it is written.

    0.3 of 10 is 3, although the float next to 0.3 times 10 is less; and no total is too large for it.
    """
    return math.floor(Fraction(str(float(ratio))) * total)


_Rule = Callable[[Sequence[Candidates], Limits, Recipe], Solution]
_MOST_ROUTES = 64


def _within(found: Found, tables: Sequence[Candidates], goal: Goal, limit: int, rule: _Rule) -> Solution:
    """What a rule makes of the limit on the whole model.

    Of an If the dearer branch counts, so MACs are limited on every route through the branches. These are
    added one by one: a plan that is best under some of them is best under all if it keeps within all.
    """
    if goal.budget is not Budget.MACS:
        kept = sum(int(table.cost[0]) for table in tables)
        return rule(tables, Limits.single(tables, limit - (_total(found, goal) - kept)), goal.recipe)
    routes = [found.route()]
    while True:
        limits = macs_limits(found.layers, tables, found.work, routes, limit)
        solution = rule(tables, limits, goal.recipe)
        choices = _choices(tables, solution)
        route = found.route(choices)
        if found.total(goal.budget, choices) <= limit or route in routes:
            return solution
        if len(routes) == _MOST_ROUTES:
            return solution if rule is smallest else _tightened(found, tables, goal, limit, limits, solution)
        routes.append(route)


def _tightened(
    found: Found, tables: Sequence[Candidates], goal: Goal, limit: int, limits: Limits, relaxed: Solution
) -> Solution:
    """A plan that keeps within a limit by tightening others, where there are too many routes.

    Args:
        found: The model.
        tables: The candidates of its layers.
        goal: What the plan is made for.
        limit: The largest total of the whole model.
        limits: Some of the routes' limits.
        relaxed: The best plan under these; the gap tells how far from it the tightening led.

    Raises:
        BudgetError: Not even the smallest plan keeps within the limit.
    """
    solution, less = relaxed, 0
    while (excess := found.total(goal.budget, _choices(tables, solution)) - limit) > 0:
        less = 2 * less + excess
        tighter = replace(limits, budgets=limits.budgets - less)
        least = smallest(tables, tighter, goal.recipe)
        if found.total(goal.budget, _choices(tables, least)) <= limit and tighter.excess(least.picks) > 0:
            solution = least
        else:
            solution = solve(tables, tighter, goal.recipe)
    if relaxed.gap is None:
        return solution
    bound = relaxed.objective * (1 - relaxed.gap)
    return replace(solution, gap=1 - bound / solution.objective if solution.objective else 0.0)


def _choices(tables: Sequence[Candidates], solution: Solution) -> tuple[Choice, ...]:
    return tuple(
        Choice(table.layer, table.option(pick), int(table.cost[pick]), float(table.error[pick]))
        for table, pick in zip(tables, solution.picks, strict=True)
    )


def _reasons(
    tables: Sequence[Candidates], solution: Solution, recipe: Recipe, budget: Budget
) -> dict[str, str]:
    """Why the plan keeps the layers that it keeps."""
    if not any(solution.picks):
        spared = "the ratio asks for no decomposition"
    elif recipe.aggregate is Aggregate.UNIFORM:
        spared = "at the relative rank of all layers it is no smaller"
    else:
        spared = "the other layers reach the ratio at less error"
    return {
        table.layer: spared if table.cost.size > 1 else _alone(table, budget)
        for table, pick in zip(tables, solution.picks, strict=True)
        if pick == 0
    }


def _alone(table: Candidates, budget: Budget) -> str:
    """Why a layer has no option."""
    if budget is not Budget.LATENCY:
        return "no option of the recipe is cheaper"
    if table.cost[0] == 0:
        return "it did not run when the model was timed, or cannot be timed on its own"
    return "no option of the recipe, at ranks in multiples of --align, is clearly faster"
