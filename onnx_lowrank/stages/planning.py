"""Planning: from the candidates of every layer to one choice for every layer."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from onnx_lowrank import measures
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.joins import FEW, joined, sharings_of
from onnx_lowrank.allocate.limits import Limits
from onnx_lowrank.allocate.options import Candidates, unscored
from onnx_lowrank.allocate.pairs import Classes, pairs_of
from onnx_lowrank.allocate.solve import Solution, smallest, solve, unchanged
from onnx_lowrank.budgets.budget import Meter
from onnx_lowrank.core.layer import Layer, narrow_layers
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.core.plan import Aggregate, Choice, Plan, Solver
from onnx_lowrank.documents import plans
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.errors import BudgetError, PlanError
from onnx_lowrank.files.load import Model
from onnx_lowrank.logs import DETAIL, first_names
from onnx_lowrank.progress import Progress
from onnx_lowrank.stages import unmeasured
from onnx_lowrank.stages.score import Scores

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Goal:
    """The purpose of a plan: a ratio to reach by a recipe.

    Attributes:
        ratio: The ratio asked for.
        recipe: The recipe.
    """

    ratio: float
    recipe: Recipe


def replay(plan: Plan, model: Model, layers: Sequence[Layer], meter: Meter) -> Plan:
    """Take over an existing plan. An edited plan is put in graph order and gets its true costs.

    Args:
        plan: The plan.
        model: The model.
        layers: Its layers, in graph order.
        meter: The plan's budget on the model.

    Raises:
        PlanError: It does not fit the model.
        InputError: The model cannot be counted.
    """
    plans.check(plan, model.sha256, layers)
    used = {choice.option.lowering for choice in plan.choices if choice.option is not None}
    budget = meter.budget
    for lowering, is_counted, what in (
        (Lowering.SHARED, Lowering.SHARED in budget.shares, "shares encoders"),
        (Lowering.SUMMED, Lowering.SUMMED in budget.shares, "shares decoders"),
        (Lowering.SPARSE, budget.keeps_rows, "keeps rows of tables"),
    ):
        if lowering in used and not is_counted:
            raise PlanError(
                f"The plan {what}, and the budget {budget.name} does not count them: set the lowering of "
                f"every {lowering} layer to null."
            )
    by_id = {choice.layer: choice for choice in plan.choices}
    if meter.budget.is_measured:
        if not plans.is_edited(plan):
            return plan
        # Which costs and errors still belong to their options is unknown.
        ordered = (by_id[layer.id] for layer in layers)
        return _edited(
            plan, [replace(choice, error=math.nan if choice.option else 0.0) for choice in ordered]
        )
    # The total comes first, or a model that cannot be counted is replayed: its layers may still have costs.
    _ = meter.total
    narrow = narrow_layers([(layer, by_id[layer.id].option) for layer in layers])
    choices = tuple(_repriced(by_id[layer.id], layer, narrow.get(layer.id), meter) for layer in layers)
    # Another --input-shape changes costs, and then another plan may be the best.
    priced = [choice.cost for choice in plan.choices] == [choice.cost for choice in choices]
    if priced and not plans.is_edited(plan):
        return plan
    return _edited(plan, choices)


def _edited(plan: Plan, choices: Sequence[Choice]) -> Plan:
    """A plan with changed choices, without the solver's proof."""
    reasoned = tuple(
        replace(choice, reason="" if choice.option else "the replayed plan keeps it") for choice in choices
    )
    return plans.sealed(replace(plan, choices=reasoned, solver=None))


def _repriced(choice: Choice, layer: Layer, narrow: Layer | None, meter: Meter) -> Choice:
    """A choice with its true cost; if this differs, the option was edited and its error is unknown."""
    true = meter.tariff(layer).cost(choice.option) if narrow is None else meter.tariff(narrow).keep
    error = 0.0 if choice.option is None else choice.error if choice.cost == true else math.nan
    return replace(choice, cost=true, error=error)


def check_reach(
    model: Model, layers: Sequence[Layer], ratio: float, recipes: Sequence[Recipe], grid: Grid[Meter]
) -> None:
    """Check from costs alone, before any error is computed, that some recipe can reach a ratio.

    A measured budget has no costs yet, so this checks nothing for it.

    Args:
        model: The model.
        layers: Its layers, in graph order.
        ratio: The ratio asked for.
        recipes: The recipes; one that reaches the ratio is enough.
        grid: The ranks to choose from, and what the ratio counts.

    Raises:
        BudgetError: No recipe reaches the ratio; the error names the smallest ratio of any.
        InputError: The model cannot be counted.
    """
    meter = grid.costs
    if meter.budget.is_measured:
        return
    limit = largest_total(ratio, meter.total)
    if ratio == 1:  # A plan that keeps all layers reaches it.
        return
    errors = []
    for recipe in recipes:
        if recipe.price not in (None, meter.budget.name):
            return  # The ratio that such a recipe reaches depends on the errors.
        shares = recipe.share and Lowering.SHARED in meter.budget.shares
        if shares and any(len(layer.siblings) > FEW for layer in layers):
            return  # Calibration decides which of many siblings may share, and so what they can save.
        goal = Goal(ratio, recipe)
        classes = _unscored(layers, recipe, grid)
        choices = classes.choices(_within(meter, classes, goal, limit, smallest).picks)
        least = meter.of_model(choices)
        if least <= limit and layers:
            return
        errors.append(_out_of_reach(model, meter, classes, goal, least))
    raise min(errors, key=lambda error: error.smallest_ratio or 1.0)


def make(model: Model, goal: Goal, scores: Scores, progress: Progress) -> Plan:
    """Make the best plan for a goal.

    Args:
        model: The model.
        goal: The purpose of the plan.
        scores: The errors of the options of its layers, and their costs.
        progress: Where to show progress.

    Raises:
        BudgetError: The ratio cannot be reached.
        InputError: The model cannot be counted.
    """
    recipe, scores = goal.recipe, scores.fitted(goal.recipe.factors)
    meter = scores.meter
    layers = scores.candidates(recipe)
    classes = Classes(layers, scores.groups(recipe), recipe)
    with progress.stage("plan"):
        solution = _solved(model, meter, classes, goal)
    choices = _reasoned(meter, layers, classes.choices(solution.picks), recipe)
    _log_plan(goal, meter, layers, choices, solution)
    plan = Plan(
        model=model.sha256,
        recipe=recipe.name,
        measure=recipe.measure,
        ratio=goal.ratio,
        budget=meter.budget.name,
        choices=choices,
        solver=Solver(recipe.aggregate, recipe.power, solution.objective, solution.gap),
        factors=recipe.factors,
        recover=recipe.recover,
    )
    return plans.sealed(plan)


def _unscored(layers: Sequence[Layer], recipe: Recipe, grid: Grid[Meter]) -> Classes:
    """The classes of a recipe without errors, as far as they are known before calibration."""
    tables = [unscored(layer, recipe, grid) for layer in layers]
    if not measures.named(recipe.measure).calibrated:
        tables = unmeasured.without_calibration(layers, tables)
    narrows = recipe.narrow and grid.costs.budget.narrows
    errors = {layer.id: np.ones(layer.width + 1) for layer in layers if narrows and layer.narrowing}
    pairs = pairs_of(layers, errors, grid)
    groups = joined(layers, grid.costs.budget.shares) if recipe.share else ()
    sizes = {layer.id: layer.size + 1 for layer in layers}
    ones = {group: [np.ones(sum(sizes[name] for name in group[1])) for _ in group[1]] for group in groups}
    return Classes(tuple(tables), (*pairs, *sharings_of(layers, ones, grid)), recipe)


def _log_plan(
    goal: Goal,
    meter: Meter,
    tables: Sequence[Candidates],
    choices: Sequence[Choice],
    solution: Solution,
) -> None:
    if not _log.isEnabledFor(logging.DEBUG):
        return
    _log.debug(
        "recipe %r rewrites %d of %d layers for ratio %g of %s: objective %g, gap %s",
        goal.recipe.name,
        sum(choice.option is not None for choice in choices),
        len(tables),
        goal.ratio,
        meter.budget.name,
        solution.objective,
        "unknown" if solution.gap is None else f"{solution.gap:g}",
    )
    kept: dict[str, list[str]] = {}
    for choice in choices:
        if choice.option is None:
            kept.setdefault(choice.reason, []).append(choice.layer)
    for reason, layers in kept.items():
        _log.debug("kept %d: %s (%s)", len(layers), reason, first_names(layers))
    for table, choice in zip(tables, choices, strict=True):
        chosen, count = choice.option or "kept", table.cost.size - 1
        _log.log(DETAIL, "%r of %d options: %s, cost %d", choice.layer, count, chosen, choice.cost)


def _solved(model: Model, meter: Meter, classes: Classes, goal: Goal) -> Solution:
    """The best plan that keeps the whole model within the ratio.

    Raises:
        BudgetError: No plan does; the error has the smallest ratio that one reaches.
    """
    limit = largest_total(goal.ratio, meter.total)
    try:
        return _within(meter, classes, goal, limit, solve)
    except BudgetError:
        solution = _within(meter, classes, goal, limit, smallest)
    least = meter.of_model(classes.choices(solution.picks))
    # Not an error yet: constraints are upper bounds of the whole model's cost, so they may be too strict.
    if least <= limit:
        return solution
    # What is written beside the factors may make every other plan larger than the input.
    if meter.total <= limit:
        return unchanged(classes.tables, goal.recipe)
    raise _out_of_reach(model, meter, classes, goal, least)


def _out_of_reach(model: Model, meter: Meter, classes: Classes, goal: Goal, least: int) -> BudgetError:
    """The error for a recipe with a least total above the ratio."""
    if not classes.layers:
        return BudgetError(
            f"{model.name} has no layer that can be decomposed, so the smallest ratio that can be "
            "reached is 1: --ratio 1 --dry-run lists every operator with the reason.",
            1.0,
        )
    # As above: the plan that keeps all layers may be the smallest.
    shown = min(math.ceil(least / meter.total * 1000) / 1000, 1.0)
    kept = [table for table in classes.layers if table.reason]
    why = f"; the layer {kept[0].layer!r} is kept, as {kept[0].reason}" if kept else ""
    if len(kept) > 1:
        why = f"; {len(kept)} layers are kept ({kept[0].layer!r} first), as {kept[0].reason}"
    return BudgetError(
        f"The ratio {goal.ratio:g} of {meter.budget.name} cannot be reached for {model.name}: raise it to "
        f"{shown:g}, the smallest with recipe {goal.recipe.name!r}, or choose another recipe{why}.",
        shown,
    )


def largest_total(ratio: float, total: int) -> int:
    """The largest whole number that is at most ratio × total, exact for the ratio as it is written.

    0.3 × 10 gives 3, although the float of 0.3 lies below 0.3. Totals may have any size.
    """
    return math.floor(Fraction(str(float(ratio))) * total)


_Rule = Callable[[Sequence[Candidates], Limits, Recipe], Solution]


def _within(meter: Meter, classes: Classes, goal: Goal, limit: int, rule: _Rule) -> Solution:
    """The solution of a rule under the limit on the whole model.

    If a constraint does not keep the whole model within the limit, further ones are added one by one: a plan
    that is best under some constraints is best under all of them if it satisfies them all.
    """
    bounds = meter.bounds(classes.layers, limit)
    while True:
        limits = classes.limits(bounds.limits)
        solution = rule(classes.tables, limits, goal.recipe)
        choices = classes.choices(solution.picks)
        if meter.of_model(choices) <= limit:
            return solution
        further = bounds.further(choices)
        if further is None:
            break
        bounds = further
    return solution if rule is smallest else _tightened(meter, classes, goal, limit, limits, solution)


def _tightened(
    meter: Meter,
    classes: Classes,
    goal: Goal,
    limit: int,
    limits: Limits,
    relaxed: Solution,
) -> Solution:
    """A plan within the limit by tighter constraints, for a model that no further constraint keeps within it.

    Args:
        meter: Counts the model.
        classes: The candidates of its layers.
        goal: The purpose of the plan.
        limit: The largest total of the whole model.
        limits: Constraints on the classes that leave the model too large.
        relaxed: The best plan under these; the gap of the result is measured from it.

    Raises:
        BudgetError: Not even the smallest plan keeps within the limit.
    """
    solution, less = relaxed, 0
    while (excess := meter.of_model(classes.choices(solution.picks)) - limit) > 0:
        less = 2 * less + excess  # Doubled, so that few rounds are enough.
        tighter = replace(limits, budgets=limits.budgets - less)
        least = smallest(classes.tables, tighter, goal.recipe)
        # If the smallest plan exceeds the tighter constraints, `solve` fails, but this plan keeps the limit.
        if meter.of_model(classes.choices(least.picks)) <= limit and tighter.excess(least.picks) > 0:
            solution = least
        else:
            solution = solve(classes.tables, tighter, goal.recipe)
    if relaxed.gap is None:
        return solution
    bound = relaxed.objective * (1 - relaxed.gap)
    return replace(solution, gap=1 - bound / solution.objective if solution.objective else 0.0)


def _reasoned(
    meter: Meter, tables: Sequence[Candidates], choices: Sequence[Choice], recipe: Recipe
) -> tuple[Choice, ...]:
    """The choices, with the reason for every layer that the plan keeps."""
    if all(choice.option is None for choice in choices):
        spared = "the ratio asks for no decomposition"
    elif recipe.aggregate is Aggregate.UNIFORM:
        spared = "at the relative rank of all layers it is no smaller"
    else:
        spared = "the other layers reach the ratio at less error"
    return tuple(
        choice
        if choice.option is not None or choice.reason
        else replace(choice, reason=spared if table.cost.size > 1 else table.reason or meter.alone(table))
        for table, choice in zip(tables, choices, strict=True)
    )
