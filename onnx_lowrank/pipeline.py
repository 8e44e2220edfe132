"""compress(): load → prepare → find layers → spectra → allocate → factorize → rewrite → validate."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any, Self

from numpy.typing import NDArray

from onnx_lowrank import plan as plans
from onnx_lowrank import planner, reporting
from onnx_lowrank import recipe as recipes
from onnx_lowrank.errors import InputError
from onnx_lowrank.graph import model as models
from onnx_lowrank.graph.atomic import replacing
from onnx_lowrank.graph.excerpt import excerpts
from onnx_lowrank.graph.external import Spill
from onnx_lowrank.graph.layers import Binding
from onnx_lowrank.graph.model import Model, ModelProto
from onnx_lowrank.graph.rewrite import Replacement, Rewritten, inline, rewrite
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.linalg.backend import Backend, parallel_map, resolve
from onnx_lowrank.linalg.factorize import certify, factorize
from onnx_lowrank.planner import Found, Goal, find_layers, prepared
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.report import Report
from onnx_lowrank.report.progress import Progress, Silent
from onnx_lowrank.types import Budget, Certificate, Factors, Option, Plan, Validation
from onnx_lowrank.validate import runtime, validate
from onnx_lowrank.validate.inputs import read as read_inputs
from onnx_lowrank.validate.inputs import specs

DEFAULT_RECIPE = "schatten"
"""The recipe that is used where nothing is known but the model; `passes/README.md` says why."""

_LARGEST_SIZE = 2**63 - 1


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

    def save_plan(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, to be edited and replayed with `compress(model, plan=path)`.

        Raises:
            InputError: The target cannot be written.
        """
        with replacing(Path(path)) as (file,):
            file.write(plans.to_json(self.plan).encode())

    def close(self) -> None:
        """Delete what a big model keeps on disk; after it, the model cannot be saved any more."""
        self._resources.close()

    def __enter__(self) -> Self:
        """Close the result when the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close the result."""
        self.close()


def compress(
    model: str | os.PathLike[str] | ModelProto,
    ratio: float | None = None,
    *,
    recipe: str | Path | Recipe | None = None,
    budget: str | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
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
        recipe: Name of a recipe, path of a TOML file, or a recipe; by default `DEFAULT_RECIPE`.
        budget: What the ratio counts: "params" (the default) or "macs".
        plan: A plan to replay, instead of ratio, recipe and budget.
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

    Returns:
        The compressed model with its report and plan. Where the model has external data, close the
        result, or use it in a `with` block.

    Raises:
        InputError: An argument or the model is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not do what the input model does.
    """
    progress = progress or Silent()
    # Whatever can be wrong is better told before the work than after it.
    goal = _goal(ratio, recipe, budget, plan)
    _require("max_error", max_error, (Real, NoneType), "a number")
    if max_error is not None and not max_error >= 0:
        raise InputError(f"The largest error to accept is {max_error}, and has to be 0 or more.")
    backend = resolve(device)
    if not dry_run:
        runtime(provider)
    shapes = _shapes(input_shape or {})
    globs = _patterns("include", include), _patterns("exclude", exclude)
    _require("inputs", inputs, (str, os.PathLike, Mapping, NoneType), "a path or arrays by input name")
    with progress.stage("find layers"):
        loaded = models.load(model)
        given = None if inputs is None else read_inputs(inputs, specs(loaded.proto))
        # The inputs to compare on tell the shapes that nobody stated.
        shapes = {name: array.shape for name, array in (given or {}).items() if array.size} | shapes
        found = find_layers(loaded, shapes, *globs)
    if isinstance(goal, Plan):
        chosen = planner.replay(goal, found)
    else:
        chosen = planner.make(found, goal, backend, progress)
    if dry_run:
        return Result(reporting.assemble(found, chosen), chosen, found.model, ExitStack())
    with ExitStack() as stack:
        rewritten, certificates = _rewritten(found, chosen, backend, progress, stack)
        with progress.stage("validate"):
            validation = _validated(found, rewritten, given, shapes, provider, max_error)
        report = reporting.assemble(found, chosen, rewritten, certificates, validation, given is not None)
        return Result(report, chosen, rewritten.model, stack.pop_all())


def _goal(
    ratio: float | None,
    recipe: str | Path | Recipe | None,
    budget: str | None,
    plan: str | os.PathLike[str] | Plan | None,
) -> Goal | Plan:
    _require("ratio", ratio, (Real, NoneType), "a number such as 0.5")
    _require("recipe", recipe, (str, os.PathLike, Recipe, NoneType), "a name, a path or a Recipe")
    _require("plan", plan, (str, os.PathLike, Plan, NoneType), "a path or a Plan")
    if (ratio is None) == (plan is None):
        raise InputError("Give either a ratio, such as --ratio 0.5, or a plan to replay with --plan FILE.")
    if plan is not None:
        if recipe is not None or budget is not None:
            raise InputError("A plan has its own recipe and budget: leave out --pass and --budget.")
        return plan if isinstance(plan, Plan) else plans.read(plan)
    if ratio is None or not 0 < ratio <= 1:
        raise InputError(f"The ratio is {ratio}, and has to be above 0 and at most 1: 0.5 keeps half.")
    known = [member.value for member in Budget]
    if budget is not None and budget not in known:
        raise InputError(f"There is no budget {budget!r}: choose one of {', '.join(known)}.")
    chosen = DEFAULT_RECIPE if recipe is None else recipe
    return Goal(
        ratio=float(ratio),
        recipe=chosen if isinstance(chosen, Recipe) else recipes.load(chosen),
        budget=Budget.PARAMS if budget is None else Budget(budget),
    )


def _require(name: str, value: object, kinds: tuple[type, ...], wanted: str) -> None:
    """Say what is wrong with an argument of the API, which nothing has parsed."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"{name} is {str(value)[:60]!r} of type {type(value).__name__}: give {wanted}.")


def _shapes(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    _require("input_shape", shapes, (Mapping,), "a mapping of input names to shapes")
    for name, shape in shapes.items():
        _require(f"The shape of input {name!r}", shape, (Sequence,), "positive whole numbers")
        if not all(isinstance(n, Integral) and 0 < n <= _LARGEST_SIZE for n in shape):
            raise InputError(
                f"The shape of input {name!r} is {shape}, and has to be of positive whole numbers."
            )
    return {name: tuple(map(int, shape)) for name, shape in shapes.items()}


def _patterns(name: str, patterns: str | Sequence[str]) -> tuple[str, ...]:
    if isinstance(patterns, str):
        return (patterns,)
    _require(name, patterns, (Iterable,), "names or globs")
    globs = tuple(patterns)
    for glob in globs:
        _require(name, glob, (str,), "names or globs")
    return globs


# --- the model ------------------------------------------------------------------------------------


def _rewritten(
    found: Found, plan: Plan, backend: Backend, progress: Progress, stack: ExitStack
) -> tuple[Rewritten, dict[str, Certificate]]:
    """Factorize every layer that the plan names, certify what is stored, and write it into the model."""
    options = {choice.layer: choice.option for choice in plan.choices if choice.option is not None}
    chosen = [(b, options[b.layer.id]) for b in found.bindings if b.layer.id in options]
    spill = stack.enter_context(Spill()) if found.model.files else None
    certificates: dict[str, Certificate] = {}

    def replacements() -> Iterator[Replacement]:
        with progress.stage("factorize", len(chosen)) as step:
            for replacement in parallel_map(partial(_replacement, found, backend), chosen, backend):
                certificates[replacement.binding.layer.id] = replacement.certificate
                step()
                yield replacement

    run = {"version": version("onnx-lowrank"), "recipe": plan.recipe, "budget": plan.budget}
    store = inline if spill is None else spill.tensor
    rewritten = rewrite(found.model, found.walk, replacements(), run, store)
    if spill is not None:
        files = {**rewritten.model.files, **spill.files}
        rewritten = replace(rewritten, model=replace(rewritten.model, files=files))
    return rewritten, certificates


def _replacement(found: Found, backend: Backend, item: tuple[Binding, Option]) -> Replacement:
    binding, option = item
    weight, dtype = prepared(found, binding)
    factors = factorize(weight, option, backend, dtype)
    stored = Factors(factors.fold, factors.encoder.astype(dtype), factors.decoder.astype(dtype))
    del factors  # a large layer's are gigabytes
    return Replacement(binding, option, stored, certify(weight, stored))


def _validated(
    found: Found,
    rewritten: Rewritten,
    inputs: Mapping[str, NDArray[Any]] | None,
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
