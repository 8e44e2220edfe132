"""compress(): load → prepare → find layers → spectra → allocate → factorize → rewrite → validate."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from onnx_lowrank import plan as plans
from onnx_lowrank import recipe as recipes
from onnx_lowrank.allocate.cost import cost, macs, parameters, total_macs, wanted_spectra
from onnx_lowrank.allocate.options import Candidates, candidates
from onnx_lowrank.allocate.solve import Solution, smallest, solve
from onnx_lowrank.errors import BudgetError, InputError
from onnx_lowrank.graph import model as models
from onnx_lowrank.graph.atomic import check_writable, replacing
from onnx_lowrank.graph.excerpt import excerpts
from onnx_lowrank.graph.external import Spill
from onnx_lowrank.graph.layers import Binding, find, read
from onnx_lowrank.graph.model import Model
from onnx_lowrank.graph.rewrite import Replacement, Rewritten, inline, rewrite
from onnx_lowrank.graph.shapes import infer, work
from onnx_lowrank.graph.walk import Place, Walk
from onnx_lowrank.linalg.backend import Backend, parallel_map, resolve
from onnx_lowrank.linalg.factorize import certify, factorize
from onnx_lowrank.linalg.spectra import spectra
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.report import LayerRow, Report, Solver, Total, Totals
from onnx_lowrank.report.progress import Progress, Silent
from onnx_lowrank.types import (
    Aggregate,
    Budget,
    Certificate,
    Choice,
    Factors,
    Layer,
    Option,
    Plan,
    ScopeWork,
    Skipped,
    Spectra,
    Validation,
)
from onnx_lowrank.validate import runtime, validate

DEFAULT_RECIPE = "power"
"""The recipe that is used where nothing is known but the model; `passes/README.md` says why."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came out.

    Attributes:
        report: Everything there is to say about it.
        plan: One choice for every layer.
        model: The compressed model; the input model where it was a dry run.
    """

    report: Report
    plan: Plan
    model: Model
    _resources: ExitStack

    @property
    def proto(self) -> ModelProto:
        """The compressed model's proto; its external data, if any, is on disk until `close`."""
        return self.model.proto

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the compressed model; over 2 GB or with external data it becomes two files.

        Raises:
            InputError: The target cannot be written.
        """
        models.save(self.model, path)

    def close(self) -> None:
        """Delete what a big model keeps on disk; the garbage collector does it otherwise."""
        self._resources.close()


@dataclass(frozen=True, slots=True)
class _Found:
    """The input model with its layers, and what it counts in all."""

    model: Model
    walk: Walk
    bindings: tuple[Binding, ...]
    skipped: tuple[Skipped, ...]
    work: tuple[ScopeWork, ...]

    @property
    def layers(self) -> tuple[Layer, ...]:
        return tuple(binding.layer for binding in self.bindings)

    def macs(self, choices: Sequence[Choice] = ()) -> int | None:
        """MACs of the model under a plan, by default as it is."""
        options = {choice.layer: choice.option for choice in choices}
        return total_macs(self.work, [(layer, options.get(layer.id)) for layer in self.layers])

    def total(self, budget: Budget, choices: Sequence[Choice] = ()) -> int:
        """What the budget counts in the model under a plan, by default as it is."""
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


def compress(
    model: str | os.PathLike[str] | ModelProto,
    ratio: float | None = None,
    *,
    recipe: str | Path | Recipe = DEFAULT_RECIPE,
    budget: str = Budget.PARAMS,
    plan: str | Path | Plan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    inputs: str | Path | Mapping[str, NDArray[Any]] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    max_error: float | None = None,
    device: str = "auto",
    provider: str = "CPUExecutionProvider",
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller by low-rank decomposition.

    Args:
        model: A path or a model in memory; it is not changed.
        ratio: Budget of the output over that of the input, above 0 and at most 1.
        recipe: Name of a recipe, path of a TOML file, or a recipe.
        budget: What the ratio counts: "params" or "macs".
        plan: A plan to replay instead of making one for a ratio.
        include: Globs of layer ids or node names; where there are any, only these are decomposed.
        exclude: Globs of layer ids or node names that are left alone.
        inputs: An .npz file, or arrays by input name, on which the models are compared; by default
            inputs are made from the graph.
        input_shape: Shapes by input name, where the model leaves dimensions open.
        max_error: Bound on the largest relative error over the outputs.
        device: Where the linear algebra runs: "auto", "cpu" or "cuda".
        provider: ONNX Runtime's execution provider for the comparison.
        dry_run: Make the plan and the report only; the model stays as it is.
        progress: Where to show progress; by default nowhere.

    Raises:
        InputError: An argument or the model is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not do what the input model does.
    """
    progress = progress or Silent()
    _check_arguments(ratio, plan, max_error)
    backend = resolve(device)
    if not dry_run:
        runtime(provider)  # a missing runtime is better told before the work than after it
    shapes = {name: tuple(shape) for name, shape in (input_shape or {}).items()}
    with progress.stage("find layers"):
        found = _find(models.load(model), shapes, include, exclude)
    if plan is not None:
        made, solver, aggregate = _replayed(plan, found), None, None
    else:
        chosen = recipe if isinstance(recipe, Recipe) else recipes.load(recipe)
        made, solver = _planned(found, float(ratio or 0), chosen, Budget(budget), backend, progress)
        aggregate = chosen.aggregate
    with ExitStack() as stack:
        rewritten, written = None, {}
        if not dry_run:
            rewritten, written = _rewritten(found, made, backend, progress, stack)
        validation = None
        if rewritten is not None:
            with progress.stage("validate"):
                validation = _validated(found, rewritten, inputs, shapes, provider, max_error)
        report = _report(found, made, solver, aggregate, rewritten, written, validation)
        result_model = found.model if rewritten is None else rewritten.model
        return Result(report, made, result_model, stack.pop_all())


def _check_arguments(ratio: float | None, plan: object, max_error: float | None) -> None:
    if (ratio is None) == (plan is None):
        raise InputError("Give either a ratio, such as --ratio 0.5, or a plan to replay with --plan FILE.")
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(f"The ratio is {ratio}, and has to be above 0 and at most 1: 0.5 keeps half.")
    if max_error is not None and not max_error >= 0:
        raise InputError(f"--max-error is {max_error}, and has to be 0 or more.")


def _find(
    model: Model, shapes: Mapping[str, tuple[int, ...]], include: Sequence[str], exclude: Sequence[str]
) -> _Found:
    walk = Walk(model.proto)
    inferred = infer(model, shapes)
    bindings, skipped = find(model, walk, inferred, include, exclude)
    places = {Place(use.scope, use.node) for binding in bindings for use in binding.layer.uses}
    return _Found(model, walk, bindings, skipped, work(walk, inferred, places))


# --- the plan -------------------------------------------------------------------------------------


def _replayed(plan: str | Path | Plan, found: _Found) -> Plan:
    made = plan if isinstance(plan, Plan) else plans.read(plan)
    plans.check(made, found.model.sha256, found.layers)
    by_id = {choice.layer: choice for choice in made.choices}
    choices = (
        replace(by_id[layer.id], cost=cost(layer, by_id[layer.id].option, made.budget)) for layer in found.layers
    )
    return replace(made, choices=tuple(choices))


def _planned(
    found: _Found, ratio: float, recipe: Recipe, budget: Budget, backend: Backend, progress: Progress
) -> tuple[Plan, Solver]:
    found.total(budget)  # unknown MACs are better told before the spectra than after them
    if not found.bindings and ratio < 1:
        raise BudgetError(
            f"{found.model.name} has no layer that can be decomposed, so the smallest ratio that can be "
            "reached is 1: --ratio 1 --dry-run lists every operator with the reason.",
            1.0,
        )
    tables = []
    with progress.stage("spectra", len(found.bindings)) as step:
        for layer, values in zip(found.layers, _spectra(found, recipe, budget, backend), strict=True):
            tables.append(candidates(layer, values, recipe, budget))
            step()
    with progress.stage("plan"):
        solution, choices = _solved(found, tables, ratio, recipe, budget)
    made = Plan(found.model.sha256, recipe.name, recipe.measure, ratio, budget, choices)
    return made, Solver(solution.objective, solution.gap)


def _spectra(found: _Found, recipe: Recipe, budget: Budget, backend: Backend) -> Iterator[Spectra]:
    """The spectra of every layer, in graph order."""

    def of(binding: Binding) -> Spectra:
        wanted = wanted_spectra(binding.layer, recipe, budget)
        if not wanted:
            return {}
        weight, dtype = _prepared(found, binding)
        return spectra(weight, wanted, backend, dtype)

    return parallel_map(of, found.bindings, backend)


def _prepared(found: _Found, binding: Binding) -> tuple[NDArray[Any], np.dtype[Any]]:
    """A layer's canonical weight with its BatchNorm folded in (then float64), and its stored dtype."""
    weight = read(found.model, found.walk, binding)
    norm = binding.layer.batchnorm
    if norm is None:
        return weight, weight.dtype
    groups, f, *rest = weight.shape
    scale = norm.scale.reshape(groups, f, *[1] * len(rest))
    return weight.astype(np.float64) * scale, weight.dtype


def _solved(
    found: _Found, tables: Sequence[Candidates], ratio: float, recipe: Recipe, budget: Budget
) -> tuple[Solution, tuple[Choice, ...]]:
    """The best plan whose whole model stays within the ratio.

    The solver sees the sum over all layers. An If counts its dearer branch only, so with MACs a plan
    within that sum can still exceed the ratio; then the sum is tightened until it does not.
    """
    total = found.total(budget)
    limit = math.floor(ratio * total * (1 + 1e-12))
    kept = sum(int(table.cost[0]) for table in tables)
    room = limit - (total - kept)
    if budget is Budget.MACS:
        room = max(room, math.floor(ratio * kept))
    while True:
        try:
            solution = solve(tables, room, recipe)
        except BudgetError as error:
            raise _out_of_reach(found, tables, total, ratio, recipe, budget) from error
        choices = tuple(
            Choice(table.layer, table.option(pick), int(table.cost[pick]), float(table.error[pick]))
            for table, pick in zip(tables, solution.picks, strict=True)
        )
        excess = found.total(budget, choices) - limit
        if excess <= 0:
            return solution, choices
        room = min(room, solution.cost) - excess


def _out_of_reach(
    found: _Found, tables: Sequence[Candidates], total: int, ratio: float, recipe: Recipe, budget: Budget
) -> BudgetError:
    kept = sum(int(table.cost[0]) for table in tables)
    least = (total - kept + smallest(tables, recipe)) / total
    shown = math.ceil(least * 1000) / 1000
    return BudgetError(
        f"The ratio {ratio:g} cannot be reached for {found.model.name}: with recipe {recipe.name!r} and "
        f"the budget {budget} the smallest is {shown:g}.",
        shown,
    )


# --- the model ------------------------------------------------------------------------------------


def _rewritten(
    found: _Found, plan: Plan, backend: Backend, progress: Progress, stack: ExitStack
) -> tuple[Rewritten, dict[str, Certificate]]:
    """Factorize every layer that the plan names, certify what is stored, and write it into the model."""
    options = {choice.layer: choice.option for choice in plan.choices if choice.option is not None}
    chosen = [(binding, options[binding.layer.id]) for binding in found.bindings if binding.layer.id in options]
    spill = stack.enter_context(Spill()) if found.model.files else None
    certificates: dict[str, Certificate] = {}

    def replacements() -> Iterator[Replacement]:
        with progress.stage("factorize", len(chosen)) as step:
            for replacement in parallel_map(partial(_replacement, found, backend), chosen, backend):
                certificates[replacement.binding.layer.id] = replacement.certificate
                step()
                yield replacement

    note = json.dumps({"version": version("onnx-lowrank"), "recipe": plan.recipe, "budget": plan.budget})
    store = inline if spill is None else spill.tensor
    rewritten = rewrite(found.model, found.walk, replacements(), {"run": note}, store)
    if spill is not None:
        files = {**rewritten.model.files, **spill.files}
        rewritten = replace(rewritten, model=replace(rewritten.model, files=files))
    return rewritten, certificates


def _replacement(found: _Found, backend: Backend, item: tuple[Binding, Option]) -> Replacement:
    binding, option = item
    weight, dtype = _prepared(found, binding)
    exact = factorize(weight, option, backend, dtype)
    stored = Factors(exact.fold, exact.encoder.astype(dtype), exact.decoder.astype(dtype))
    return Replacement(binding, option, stored, certify(weight, stored))


def _validated(
    found: _Found,
    rewritten: Rewritten,
    inputs: str | Path | Mapping[str, NDArray[Any]] | None,
    shapes: Mapping[str, tuple[int, ...]],
    provider: str,
    max_error: float | None,
) -> Validation:
    bindings = {binding.layer.id: binding for binding in found.bindings}

    @cache
    def new_walk() -> Walk:
        return Walk(rewritten.model.proto)

    def alone(layer: str) -> tuple[ModelProto, ModelProto]:
        chain = rewritten.chains[layer][0]
        return excerpts(found.model, found.walk, rewritten.model, new_walk(), bindings[layer], chain)

    last = {layer: tuple(chain[-1] for chain in chains) for layer, chains in rewritten.chains.items()}
    return validate(
        found.model,
        rewritten.model,
        last,
        alone=alone,
        inputs=inputs,
        input_shapes=shapes,
        provider=provider,
        max_error=max_error,
    )


# --- the report -----------------------------------------------------------------------------------


def _report(
    found: _Found,
    plan: Plan,
    solver: Solver | None,
    aggregate: Aggregate | None,
    rewritten: Rewritten | None,
    certificates: Mapping[str, Certificate],
    validation: Validation | None,
) -> Report:
    before = found.total(plan.budget)
    after = found.total(plan.budget, plan.choices)
    reached = after / before if before else 1.0
    return Report(
        version=version("onnx-lowrank"),
        model=Path(found.model.name).stem,
        sha256=found.model.sha256,
        recipe=plan.recipe,
        measure=plan.measure,
        aggregate=aggregate,
        budget=plan.budget,
        asked=plan.ratio,
        reached=reached,
        solver=solver,
        layers=tuple(
            _row(layer, choice, certificates.get(layer.id))
            for layer, choice in zip(found.layers, plan.choices, strict=True)
        ),
        skipped=found.skipped,
        removed_inputs=() if rewritten is None else rewritten.removed_inputs,
        totals=_totals(found, plan, rewritten),
        validation=validation,
    )


def _row(layer: Layer, choice: Choice, certificate: Certificate | None) -> LayerRow:
    option = choice.option
    return LayerRow(
        id=layer.id,
        op=layer.op,
        shape=layer.shape,
        dtype=layer.dtype,
        nodes=tuple(use.name for use in layer.uses),
        option=option,
        full_rank=None if option is None else layer.full_rank(option.fold, option.k),
        params=Total(parameters(layer), parameters(layer, option)),
        macs=Total(macs(layer), macs(layer, option)),
        error=None if option is None else choice.error,
        certificate=certificate,
        reason="" if option is not None else "the plan keeps it",
    )


def _totals(found: _Found, plan: Plan, rewritten: Rewritten | None) -> Totals:
    return Totals(
        params=Total(found.total(Budget.PARAMS), found.total(Budget.PARAMS, plan.choices)),
        macs=Total(found.macs(), found.macs(plan.choices)),
        bytes=Total(
            models.stored_bytes(found.model),
            None if rewritten is None else models.stored_bytes(rewritten.model),
        ),
    )


# --- files ----------------------------------------------------------------------------------------


def check_outputs(source: Path, *targets: Path | None) -> None:
    """Say before the work begins what would keep its results from being written.

    Raises:
        InputError: A target is the input model, or a folder, or its folder is missing or read-only.
    """
    files = [target for target in targets if target is not None and str(target) != "-"]
    for target in files:
        if target.exists() and source.exists() and target.samefile(source):
            raise InputError(f"{target} is the input model, which is never changed: name another file.")
        check_writable(target)
    if len({target.absolute() for target in files}) < len(files):
        raise InputError("Two of the output files have the same name: give each its own.")


def write(result: Result, out: Path | None, save_plan: Path | None, report: Path | None) -> None:
    """Write the model, the plan and the report, each atomically; a report named - goes to stdout.

    Raises:
        InputError: One of them cannot be written.
    """
    if out is not None:
        result.save(out)
    for path, text in ((save_plan, plans.to_json(result.plan)), (report, result.report.to_json())):
        if path is not None and str(path) == "-":
            sys.stdout.write(text)
        elif path is not None:
            with replacing(path) as (file,):
                file.write(text.encode())
