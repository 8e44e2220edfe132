"""Planning: layers -> spectra -> candidates -> one choice for every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank import plan as plans
from onnx_lowrank.allocate.cost import cost, parameters, total_macs, wanted_spectra
from onnx_lowrank.allocate.options import Candidates, candidates
from onnx_lowrank.allocate.solve import Solution, smallest, solve
from onnx_lowrank.errors import BudgetError, InputError
from onnx_lowrank.graph import model as models
from onnx_lowrank.graph.layers import Binding, find, matches, read
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.shapes import infer, work
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.linalg.backend import Backend, parallel_map
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.report import Solver
from onnx_lowrank.report.progress import Progress
from onnx_lowrank.types import Aggregate, Budget, Choice, Layer, Plan, ScopeWork, Skipped, Spectra


@dataclass(frozen=True, slots=True)
class Found:
    """The input model with its layers.

    Attributes:
        model: The model.
        walk: Its walk.
        bindings: Its layers and where they live, in graph order.
        skipped: The operators that are left alone.
        work: The MACs of every scope beside the layers'.
    """

    model: Model
    walk: Walk
    bindings: tuple[Binding, ...]
    skipped: tuple[Skipped, ...]
    work: tuple[ScopeWork, ...]

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
        options = {choice.layer: choice.option for choice in choices}
        return total_macs(self.work, [(layer, options.get(layer.id)) for layer in self.layers])

    def total(self, budget: Budget, choices: Sequence[Choice] = ()) -> int:
        """What the budget counts in the model under a plan, by default as it is.

        Raises:
            InputError: It counts MACs, and these are unknown.
        """
        options = {choice.layer: choice.option for choice in choices}
        if budget is Budget.PARAMS:
            saved = sum(parameters(layer) - parameters(layer, options.get(layer.id)) for layer in self.layers)
            return models.parameters(self.model) - saved
        count = self.macs(choices)
        if count is None:
            raise InputError(
                "The model's MACs are unknown because dimensions of its inputs are: pass them as "
                "--input-shape NAME=1,3,224,224, or choose --budget params."
            )
        return count


@dataclass(frozen=True, slots=True)
class Goal:
    """What a plan is made for: a ratio of a budget, by a recipe."""

    ratio: float
    recipe: Recipe
    budget: Budget


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and what is known of how it was made.

    Attributes:
        plan: The plan.
        reasons: Why layers are kept, by id.
        solver: How good the plan is; None where it was replayed.
    """

    plan: Plan
    reasons: Mapping[str, str]
    solver: Solver | None = None


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
    found = Found(model, walk, bindings, skipped, work(walk, inferred, places))
    for pattern in (*include, *exclude):
        if not matches(found.names(), pattern):
            raise InputError(
                f"No layer or operator of {model.name} is named {pattern!r}: "
                "--ratio 1 --dry-run --report - lists their names."
            )
    return found


def replay(plan: Plan, found: Found) -> Planned:
    """Take over a plan that was made before, with the layers in graph order and their true costs.

    Raises:
        PlanError: It does not fit the model.
        InputError: It counts MACs, and these are unknown.
    """
    plans.check(plan, found.model.sha256, found.layers)
    found.total(plan.budget)
    by_id = {choice.layer: choice for choice in plan.choices}
    choices = tuple(_repriced(by_id[layer.id], layer, plan.budget) for layer in found.layers)
    return Planned(
        replace(plan, choices=choices),
        {choice.layer: "the replayed plan keeps it" for choice in choices if choice.option is None},
    )


def _repriced(choice: Choice, layer: Layer, budget: Budget) -> Choice:
    """A choice with its true cost; where that is another, the option was edited and its error is unknown."""
    true = cost(layer, choice.option, budget)
    error = 0.0 if choice.option is None else choice.error if choice.cost == true else math.nan
    return replace(choice, cost=true, error=error)


def make(found: Found, goal: Goal, backend: Backend, progress: Progress) -> Planned:
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
    plan = Plan(
        model=found.model.sha256,
        recipe=goal.recipe.name,
        measure=goal.recipe.measure,
        ratio=goal.ratio,
        budget=goal.budget,
        choices=_choices(tables, solution),
    )
    reasons = _reasons(tables, solution, goal.recipe)
    recipe = goal.recipe
    solver = Solver(recipe.aggregate, recipe.power, solution.objective, solution.gap)
    return Planned(plan, reasons, solver)


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

    The solver sees the sum over all layers. An If counts its dearer branch only, so with MACs a plan
    within that sum can still exceed the ratio; then the sum is tightened until it does not. Every step
    is as small as the excess, so that a ratio which the smallest plan reaches is never missed.
    """
    total = found.total(goal.budget)
    limit = math.floor(goal.ratio * total * (1 + 1e-12))
    kept = sum(int(table.cost[0]) for table in tables)
    room = limit - (total - kept)
    if goal.budget is Budget.MACS:
        room = max(room, math.floor(goal.ratio * kept))
    least = smallest(tables, goal.recipe)
    while room >= least:
        solution = solve(tables, room, goal.recipe)
        excess = found.total(goal.budget, _choices(tables, solution)) - limit
        if excess <= 0:
            return solution
        room = min(room, solution.cost) - excess
    choices = _choices(tables, solve(tables, least, goal.recipe))
    shown = math.ceil(found.total(goal.budget, choices) / total * 1000) / 1000
    raise BudgetError(
        f"The ratio {goal.ratio:g} of {goal.budget} cannot be reached for {found.model.name}: the smallest "
        f"with recipe {goal.recipe.name!r} is {shown:g}.",
        shown,
    )


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
