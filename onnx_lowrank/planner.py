"""Planning: layers -> spectra -> candidates -> one choice for every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank import plan as plans
from onnx_lowrank.allocate.cost import cost, dearest, parameters, running, total_macs, wanted_spectra
from onnx_lowrank.allocate.limits import Limits, macs_limits
from onnx_lowrank.allocate.options import Candidates, candidates
from onnx_lowrank.allocate.solve import Solution, smallest, solve
from onnx_lowrank.errors import BudgetError, InputError
from onnx_lowrank.graph import model as models
from onnx_lowrank.graph.layers import Binding, find, matches, read
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.shapes import infer, open_inputs, work
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.linalg.backend import Backend, parallel_map
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.report.progress import Progress
from onnx_lowrank.types import (
    Aggregate,
    Budget,
    Choice,
    Layer,
    Option,
    Plan,
    Positions,
    ScopeWork,
    Skipped,
    Solver,
    Spectra,
)


@dataclass(frozen=True, slots=True)
class Found:
    """The input model with its layers.

    Attributes:
        model: The model.
        walk: Its walk.
        bindings: Its layers and where they live, in graph order.
        skipped: The operators that are left alone.
        work: The MACs of every scope beside the layers'.
        open_inputs: Names of the inputs of which a dimension is unknown.
    """

    model: Model
    walk: Walk
    bindings: tuple[Binding, ...]
    skipped: tuple[Skipped, ...]
    work: tuple[ScopeWork, ...]
    open_inputs: tuple[str, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in graph order."""
        return tuple(binding.layer for binding in self.bindings)

    def names(self) -> Iterator[str]:
        """All names by which --include and --exclude can mean a layer or an operator."""
        for layer in self.layers:
            yield layer.id
            yield from (use.name for use in layer.uses)
        for skipped in self.skipped:
            yield from (skipped.name, skipped.weight, f"{skipped.scope}/{skipped.weight}")

    def macs(self, choices: Sequence[Choice] = ()) -> int | None:
        """MACs of the model under a plan, by default as it is."""
        return total_macs(self.work, self._options(choices))

    def route(self, choices: Sequence[Choice] = ()) -> Mapping[str, int]:
        """How often every scope runs where the model under a plan, by default as it is, is dearest."""
        return dearest(self.work, self._options(choices))[1]

    def _options(self, choices: Sequence[Choice]) -> list[tuple[Layer, Option | None]]:
        options = {choice.layer: choice.option for choice in choices}
        return [(layer, options.get(layer.id)) for layer in self.layers]

    def total(self, budget: Budget, choices: Sequence[Choice] = ()) -> int:
        """What the budget counts in the model under a plan, by default as it is.

        Raises:
            InputError: It counts MACs, and these are unknown.
        """
        if budget is Budget.PARAMS:
            saved = sum(parameters(layer) - parameters(layer, of) for layer, of in self._options(choices))
            return models.parameters(self.model) - saved
        count = self.macs(choices)
        if count is None:
            raise InputError(f"The model's MACs are unknown because {self._unknown()}")
        return count

    def _unknown(self) -> str:
        """Why the MACs are unknown, and what to do about it."""
        if self.open_inputs:
            return (
                f"dimensions of its inputs {', '.join(self.open_inputs)} are: pass them as "
                "--input-shape NAME=1,3,224,224, or choose --budget params."
            )
        for scope in self.work:
            uses = (use for layer in self.layers for use in layer.uses if use.scope == scope.path)
            name = next((use.name for use in uses if use.positions is None), scope.unknown)
            if name and scope.path in running(self.work):
                place = f" in {scope.path}" if scope.path else ""
                return (
                    f"the shapes at node {name!r}{place} do not follow from its inputs' shapes: inline "
                    "functions and check --input-shape, or choose --budget params."
                )
        return "its functions call themselves: choose --budget params."


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan is made for: a ratio of a budget, by a recipe."""

    ratio: float
    recipe: Recipe
    budget: Budget


def find_layers(
    model: Model, shapes: Mapping[str, tuple[int, ...]], include: Sequence[str], exclude: Sequence[str]
) -> Found:
    """Find a model's layers, and count what it holds beside them.

    Args:
        model: The model.
        shapes: Shapes of inputs, by name, which the model leaves open.
        include: Globs of layer ids or node names; where there are any, only these become layers.
        exclude: Globs of layer ids or node names that do not.

    Raises:
        InputError: A shape does not fit the model, or a glob names nothing in it.
    """
    walk = Walk(model.proto)
    inferred = infer(model, shapes)
    bindings, skipped = find(model, walk, inferred, include, exclude)
    places = {Place(use.scope, use.node) for binding in bindings for use in binding.layer.uses}
    scopes = work(walk, inferred, places)
    ran = running(scopes)
    bindings = tuple(_idle(binding, ran) for binding in bindings)
    found = Found(model, walk, bindings, skipped, scopes, open_inputs(model, inferred))
    for pattern in (*include, *exclude):
        if not matches(found.names(), pattern):
            raise InputError(
                f"No layer or operator of {model.name} is named {pattern!r}: "
                "--ratio 1 --dry-run --report - lists their names."
            )
    return found


def _idle(binding: Binding, running: Container[str]) -> Binding:
    """A layer whose uses in functions that nothing calls are evaluated nowhere."""
    uses = tuple(
        use if use.scope in running else replace(use, positions=_nowhere(binding.layer))
        for use in binding.layer.uses
    )
    return replace(binding, layer=replace(binding.layer, uses=uses))


def _nowhere(layer: Layer) -> Positions:
    return Positions(0, (0,) * len(layer.kernel), (0,) * len(layer.kernel))


def replay(plan: Plan, found: Found) -> Plan:
    """Take over a plan that was made before; an edited one in graph order and at its true costs.

    Raises:
        PlanError: It does not fit the model.
        InputError: It counts MACs, and these are unknown.
    """
    plans.check(plan, found.model.sha256, found.layers)
    found.total(plan.budget)
    by_id = {choice.layer: choice for choice in plan.choices}
    choices = tuple(_repriced(by_id[layer.id], layer, plan.budget) for layer in found.layers)
    # Other positions (--input-shape) make other costs, under which another plan may be the best.
    priced = [choice.cost for choice in plan.choices] == [choice.cost for choice in choices]
    if priced and not plans.is_edited(plan):
        return plan
    edited = tuple(
        replace(choice, reason="" if choice.option else "the replayed plan keeps it") for choice in choices
    )
    return plans.sealed(replace(plan, choices=edited, solver=None))


def _repriced(choice: Choice, layer: Layer, budget: Budget) -> Choice:
    """A choice with its true cost; where that is another, the option was edited and its error is unknown."""
    true = cost(layer, choice.option, budget)
    error = 0.0 if choice.option is None else choice.error if choice.cost == true else math.nan
    return replace(choice, cost=true, error=error)


def make(found: Found, goal: Goal, backend: Backend, progress: Progress) -> Plan:
    """Make the best plan for a goal.

    Raises:
        BudgetError: The ratio cannot be reached.
        InputError: MACs are needed and unknown.
    """
    found.total(goal.budget)
    if not found.bindings and goal.ratio < 1:
        raise BudgetError(
            f"{found.model.name} has no layer that can be decomposed, so the smallest ratio that can be "
            "reached is 1: --ratio 1 --dry-run lists every operator with the reason.",
            1.0,
        )
    tables = []
    with progress.stage("spectra", len(found.bindings)) as step:
        for layer, values in zip(found.layers, _spectra(found, goal, backend), strict=True):
            tables.append(candidates(layer, values, goal.recipe, goal.budget))
            step()
    with progress.stage("plan"):
        solution = _solved(found, tables, goal)
    recipe = goal.recipe
    reasons = _reasons(tables, solution, recipe)
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
    )
    return plans.sealed(plan)


def _spectra(found: Found, goal: Goal, backend: Backend) -> Iterator[Spectra]:
    """The spectra of every layer, in graph order."""

    def of(binding: Binding) -> Spectra:
        wanted = wanted_spectra(binding.layer, goal.recipe, goal.budget)
        if not wanted:
            return {}
        weight, dtype = prepared(found, binding)
        return spectra(weight, wanted, backend, dtype)

    return parallel_map(of, found.bindings, backend)


def prepared(found: Found, binding: Binding) -> tuple[NDArray[Any], np.dtype[Any]]:
    """A layer's canonical weight with its BatchNorm folded in (then float64), and its stored dtype."""
    weight = read(found.model, found.walk, binding)
    norm = binding.layer.batchnorm
    if norm is None:
        return weight, weight.dtype
    groups, f, *rest = weight.shape
    scale = norm.scale.reshape(groups, f, *[1] * len(rest))
    return weight.astype(np.float64) * scale, weight.dtype


def _solved(found: Found, tables: Sequence[Candidates], goal: Goal) -> Solution:
    """The best plan whose whole model stays within the ratio.

    Raises:
        BudgetError: There is none; the error knows the smallest ratio that there is.
    """
    total = found.total(goal.budget)
    limit = largest_total(goal.ratio, total)
    try:
        return _within(found, tables, goal, limit, solve)
    except BudgetError:
        choices = _choices(tables, _within(found, tables, goal, limit, smallest))
    shown = math.ceil(found.total(goal.budget, choices) / total * 1000) / 1000
    raise BudgetError(
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
    if goal.budget is Budget.PARAMS:
        kept = sum(int(table.cost[0]) for table in tables)
        return rule(tables, Limits.single(tables, limit - (found.total(goal.budget) - kept)), goal.recipe)
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


def _reasons(tables: Sequence[Candidates], solution: Solution, recipe: Recipe) -> dict[str, str]:
    """Why the plan keeps the layers that it keeps."""
    if not any(solution.picks):
        spared = "the ratio asks for no decomposition"
    elif recipe.aggregate is Aggregate.UNIFORM:
        spared = "at the relative rank of all layers it is no smaller"
    else:
        spared = "the other layers reach the ratio at less error"
    return {
        table.layer: spared if table.cost.size > 1 else "no option of the recipe is cheaper"
        for table, pick in zip(tables, solution.picks, strict=True)
        if pick == 0
    }
