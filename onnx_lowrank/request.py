"""Check the arguments of compress(), alone and in combination."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING

from onnx_lowrank import measures, shape_sets, targets
from onnx_lowrank.budgets import registry
from onnx_lowrank.budgets.budget import Budget
from onnx_lowrank.calibrate.allowance import Allowance
from onnx_lowrank.calibrate.sources import source
from onnx_lowrank.calibrate.sources.registry import check_sources, options_of
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Style
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans, recipes
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.engines import kinds
from onnx_lowrank.engines.engine import Deployed
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.hardware import block, has_blocked_layout
from onnx_lowrank.linalg.backend import check_device
from onnx_lowrank.machine import allowance, cache, scheduler, thread_count, worker_count
from onnx_lowrank.options import Inputs, Options, flag, require
from onnx_lowrank.quantize import registry as quantizations
from onnx_lowrank.quantize.int4 import BLOCK
from onnx_lowrank.quantize.kind import Kind
from onnx_lowrank.stages.search import AUTO, Target
from onnx_lowrank.training import Distillation, distillation

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.data import Source

_log = logging.getLogger(__name__)

DEFAULT_RECIPE = "schatten"
"""The default recipe without calibration data; `passes/README.md` gives the reason."""

DEFAULT_BUDGET = "params"

AUTO_RECIPE = "auto"
"""Stands for several recipes; held-out calibration inputs choose one of them."""

ALIGN_AUTO = "auto"
"""Stands for the blocks in which the execution provider computes."""

ALIGN_INT4 = "int4"
"""Stands for the blocks of `--then int4`."""

_LARGEST_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Request:
    """The compressed model that the user asks for.

    Attributes:
        budget: The budget that the ratio bounds.
        block: Ranks are multiples of this number.
        blocked: Whether convolutions keep to the ranks and widths of ONNX Runtime's blocked layout.
        styles: Which lowerings the plan may have; empty for the native ones.
        recipes: The recipes to choose from; empty if a plan is replayed.
        ratio: The ratio to reach; None if a target or a plan replaces it.
        target: The bounds on the outputs that replace a ratio; None without them.
        plan: The plan to replay; None without one.
        then: The quantization that follows; None for none.
        training: The distillation that follows; None for none.
    """

    budget: Budget
    block: int = 1
    blocked: bool = False
    styles: frozenset[Style] = frozenset()
    recipes: tuple[Recipe, ...] = ()
    ratio: float | None = None
    target: Target | None = None
    plan: Plan | None = None
    then: Kind | None = None
    training: Distillation | None = None

    @property
    def fits_activations(self) -> bool:
        """Whether scores or factors need statistics of activations."""
        if self.plan is not None:
            return self.plan.factors is not Fit.WEIGHTS
        return any(recipe.calibrated for recipe in self.recipes)

    @property
    def is_search(self) -> bool:
        """Whether the plan is found by making models and comparing them."""
        return self.target is not None or len(self.recipes) > 1


@dataclass(frozen=True, slots=True)
class Setting:
    """The data, the tools and the bounds of a run.

    Attributes:
        calibration: The inputs to fit to; None without calibration.
        samples: Largest number of these inputs to use; None for all.
        inputs: The inputs to compare the models on; None if the user gives none.
        check: Inputs of another kind to compare the models on, too; None if the user gives none.
        sets: Sets of shapes of inputs whose dimensions the model leaves open, by name; at least one.
        weights: The share of calls with each set.
        include: Globs of the layers and nodes to decompose; empty for all.
        exclude: Globs of the layers and nodes to leave alone.
        max_error: The largest accepted relative error of an output; None for any.
        device: Where the linear algebra runs: auto, cpu or cuda.
        provider: ONNX Runtime's execution provider.
        engine: The name of the engine that compares and times the models; None for ONNX Runtime.
        time: Whether the finished model is timed against the input model under every budget.
        threads: Number of threads per operator while times are measured; 0 leaves it to the runtime.
        cache: The folder that keeps results for other runs; True for the user's cache folder, which keeps
            those of large models only, and times; False for none.
        memory: The memory that calibration may take.
        workers: Number of processes that compute work items; 0 uses threads of this process.
        scheduler: Address of the scheduler of a Dask cluster that computes them instead; None without one.
        dry_run: Whether only the plan is made.
        options: What the user gives to read texts and images.
        synthetic: Whether made inputs stand in for calibration.
    """

    calibration: Source | None
    samples: int | None
    inputs: Inputs | None
    check: Source | None
    sets: tuple[Mapping[str, tuple[int, ...]], ...]
    weights: tuple[float, ...]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    max_error: float | None
    device: str
    provider: str
    engine: str | None
    time: bool
    threads: int
    cache: bool | Path
    memory: Allowance
    workers: int
    scheduler: str | None
    dry_run: bool
    options: source.Options
    synthetic: bool = False

    @property
    def has_own_engine(self) -> bool:
        """Whether another engine than ONNX Runtime compares and times the models."""
        return self.engine not in (None, kinds.DEFAULT)

    @property
    def tool(self) -> Deployed:
        """The engine that compares and times the models.

        Raises:
            InputError: There is no such engine, or it is not installed.
        """
        return kinds.engine(self.engine, self.provider)


def request(ratio: float | None, options: Options) -> Request:
    """Check the arguments that determine the compressed model.

    Args:
        ratio: As in `compress`.
        options: All options of `compress`, with their defaults.

    Raises:
        InputError: An argument is wrong, or cannot be combined with another one.
    """
    recipe, budget, align, plan = options["recipe"], options["budget"], options["align"], options["plan"]
    then = options["then"]
    calibrated, recover = _is_calibrated(options), options["recover"]
    target = _target(options["target_error"], options["target_agreement"], calibrated=calibrated)
    require("ratio", ratio, (Real, NoneType), "a number such as 0.5")
    require("recipe", recipe, (str, os.PathLike, Recipe, NoneType), "a name, a path or a Recipe")
    require("plan", plan, (str, os.PathLike, Plan, NoneType), "a path or a Plan")
    require("target", options["target"], (str, NoneType), "a name")
    target_rules = targets.named(options["target"])
    styles = _styles(options["lowering"])
    require("then", then, (str, NoneType), "a kind of quantization, such as int8")
    if sum(goal is not None for goal in (ratio, plan, target)) != 1:
        raise InputError(
            "Give exactly one of these: a ratio, such as --ratio 0.5; a plan to replay, with --plan FILE; "
            "or a target, with --calibration and --target-error or --target-agreement."
        )
    if plan is not None:
        if any(argument is not None for argument in (recipe, budget, align)):
            raise InputError(
                "A plan has its own recipe, budget and ranks: leave out --pass, --budget and --align."
            )
        if styles or options["target"] is not None:
            raise InputError("A plan has its own ranks and operators: leave out --lowering and --target.")
        if then is not None:
            raise InputError("A plan has its own quantization: leave out --then.")
        return _replayed(plan, options, calibrated=calibrated, recover=recover)
    if ratio is not None and not 0 < ratio <= 1:
        hint = f"{ratio / 100:g} keeps {ratio:g} %" if 2 <= ratio <= 100 else "0.5 keeps half"
        raise InputError(f"The ratio is {ratio}, but it must be above 0 and at most 1: {hint}.")
    counted = registry.named(DEFAULT_BUDGET if budget is None else budget)
    align = target_rules.align if align is None else align
    if align is None and counted.is_aligned:
        align = ALIGN_AUTO
    asked = Request(
        budget=counted,
        block=_block(align, options["provider"]),
        blocked=align is None and has_blocked_layout(options["provider"]),
        styles=styles or frozenset(target_rules.styles),
        recipes=_recipes(recipe, calibrated=calibrated, recover=recover),
        ratio=None if ratio is None else float(ratio),
        target=target,
        then=None if then is None else quantizations.named(then),
        training=distillation(options, None, calibrated=calibrated),
    )
    aim = target if ratio is None else f"ratio {ratio:g}"
    _log.debug("asked for %s of %s; ranks are multiples of %d", aim, counted.name, asked.block)
    return asked


def setting(asked: Request, options: Options) -> Setting:
    """Check the arguments for the data, the tools and the bounds of a run.

    Args:
        asked: The checked request.
        options: All options of `compress`, with their defaults.

    Raises:
        InputError: An argument is wrong, or the device or the execution provider is not available.
    """
    max_error, inputs = options["max_error"], options["inputs"]
    require("engine", options["engine"], (str, NoneType), f"one of {', '.join(kinds.names())}")
    require("max_error", max_error, (Real, NoneType), "a number")
    if max_error is not None and not max_error >= 0:
        raise InputError(f"The largest accepted error is {max_error}, but it must be 0 or more.")
    require("inputs", inputs, (str, os.PathLike, Mapping, NoneType), "a path or arrays by input name")
    check, dry_run = options["check"], options["dry_run"]
    require("check", check, (object,), "a path, arrays by name, or feeds")
    if check is not None and dry_run:
        raise InputError(
            "--check judges the finished model, and --dry-run makes none: leave one of them out."
        )
    if flag("time", options["time"]) and dry_run and not asked.budget.is_measured:
        raise InputError("--time times the finished model, and --dry-run makes none: leave one of them out.")
    sets = shape_sets.sets(options["input_shape"])
    if not (options["time"] or asked.budget.is_measured):
        _refuse_clock(options, len(sets))
    checked = Setting(
        calibration=options["calibration"],
        samples=options["calibration_samples"],
        inputs=inputs,
        check=check,
        sets=sets,
        weights=shape_sets.weights(options["weights"], len(sets)),
        include=_patterns("include", options["include"]),
        exclude=_patterns("exclude", options["exclude"]),
        max_error=max_error,
        provider=options["provider"],
        engine=options["engine"] or targets.named(options["target"]).engine,
        time=options["time"],
        threads=thread_count(options["threads"]),
        workers=worker_count(options["workers"]),
        scheduler=scheduler(options["scheduler"], options["workers"]),
        cache=cache(options["cache"]),
        memory=allowance(options["memory"], calibrated=_is_calibrated(options)),
        device=check_device(options["device"]),
        dry_run=dry_run,
        options=options_of(options["tokenizer"], options["mean"], options["std"]),
        synthetic=options["synthetic"],
    )
    check_sources([checked.calibration, inputs, check], checked.options)
    if checked.calibration is not None or asked.budget.is_measured or not dry_run:
        runtime(checked.provider)  # Raises an error if the provider is not available.
        _ = checked.tool  # Likewise for the engine.
    elif options["engine"] is not None:
        _ = checked.tool
    return checked


def _replayed(
    plan: str | os.PathLike[str] | Plan, options: Options, *, calibrated: bool, recover: bool
) -> Request:
    known = plan if isinstance(plan, Plan) else plans.read(plan)
    measures.named(known.measure)  # Reading checks the name, but a Plan made in Python was never read.
    _log.debug("replays a plan of recipe %r for ratio %g of %s", known.recipe, known.ratio, known.budget)
    if known.factors is not Fit.WEIGHTS and not calibrated:
        raise InputError("The plan's factors are fitted to calibration inputs: pass them with --calibration.")
    return Request(
        budget=registry.named(known.budget),
        plan=known if recover else replace(known, recover=False),
        then=quantizations.named(known.then) if known.then else None,
        training=distillation(options, known, calibrated=calibrated),
    )


def _block(align: int | str | None, provider: str) -> int:
    """The number that divides all ranks."""
    if align is None:
        return 1
    if align == ALIGN_AUTO:
        return block(provider)
    if align == ALIGN_INT4:
        return BLOCK
    wrong = isinstance(align, bool) or not isinstance(align, Integral)
    if wrong or not 1 <= int(align) <= _LARGEST_BLOCK:
        raise InputError(
            f"The alignment is {str(align)[:60]!r}, but it must be {ALIGN_AUTO!r} or a whole number from 1 "
            f"to {_LARGEST_BLOCK} ({ALIGN_INT4!r} stands for {BLOCK})."
        )
    return int(align)


def _styles(given: str | Sequence[str] | None) -> frozenset[Style]:
    """Check the names of styles, which a comma separates in a text.

    Raises:
        InputError: A name is wrong, or two styles contradict each other.
    """
    require("lowering", given, (str, Sequence, NoneType), f"names, of {', '.join(Style)}")
    names = given.split(",") if isinstance(given, str) else given or ()
    for name in names:
        if name not in tuple(Style):
            raise InputError(f"There is no lowering {str(name)[:60]!r}: choose of {', '.join(Style)}.")
    styles = frozenset(map(Style, names))
    if styles >= {Style.CONV, Style.MATMUL}:
        raise InputError(
            f"--lowering is {','.join(names)}, but conv and matmul exclude each other: choose one of them."
        )
    return styles


def _recipes(recipe: str | Path | Recipe | None, *, calibrated: bool, recover: bool) -> tuple[Recipe, ...]:
    """The recipes to choose from, with recovery turned off if the user does so."""
    if recipe is None:
        recipe = AUTO_RECIPE if calibrated else DEFAULT_RECIPE
    if recipe == AUTO_RECIPE:
        if not calibrated:
            raise InputError(
                "--pass auto chooses by held-out calibration inputs: pass some with --calibration, or leave "
                f"it out for the recipe {DEFAULT_RECIPE!r}."
            )
        chosen = [recipes.load(name) for name in AUTO]
    else:
        others = (AUTO_RECIPE,) if calibrated else ()
        chosen = [recipe if isinstance(recipe, Recipe) else recipes.load(recipe, others)]
    for one in chosen:
        if one.calibrated and not calibrated:
            raise InputError(
                f"The recipe {one.name!r} needs calibration inputs: pass some with --calibration, or choose "
                "a recipe that needs none (--list-passes)."
            )
        _log.debug(
            "recipe %r: folds %s, slices %s, %s errors, aggregate %s, factors fitted to %s",
            one.name,
            "/".join(one.folds),
            "all" if one.groups is None else one.groups,
            one.measure,
            one.aggregate,
            one.factors,
        )
    return tuple(one if recover else replace(one, recover=False) for one in chosen)


def _target(error: float | None, agreement: float | None, *, calibrated: bool) -> Target | None:
    """Check the bounds on the outputs that replace a ratio.

    Raises:
        InputError: A number is wrong, or there is no calibration data to measure the outputs on.
    """
    require("target_error", error, (Real, NoneType), "a number")
    require("target_agreement", agreement, (Real, NoneType), "a number")
    if error is None and agreement is None:
        return None
    if not calibrated:
        raise InputError("A target is judged on held-out calibration inputs: pass some with --calibration.")
    if error is not None and not error >= 0:
        raise InputError(f"The target error is {error}, but it must be 0 or more: 0.05 allows five per cent.")
    if agreement is not None and not 0 < agreement <= 1:
        raise InputError(
            f"The target agreement is {agreement}, but it must be above 0 and at most 1: 0.99 asks for 99 "
            "per cent."
        )
    return Target(error, agreement)


def _is_calibrated(options: Options) -> bool:
    """Whether there is calibration data; also checks the arguments that need calibration data.

    Raises:
        InputError: One of them is wrong, or is given without calibration data.
    """
    calibration, samples = options["calibration"], options["calibration_samples"]
    require("calibration", calibration, (object,), "a path, arrays by name, or feeds")
    require("calibration_samples", samples, (Integral, NoneType), "a whole number")
    recover = flag("recover", options["recover"])
    if samples is not None and samples < 1:
        raise InputError(f"--calibration-samples is {samples}: pass 1 or more.")
    if calibration is None and samples is not None:
        raise InputError("--calibration-samples limits what --calibration reads: pass --calibration, too.")
    if calibration is None and not recover and not options["synthetic"]:
        raise InputError("--no-recover turns off a step that only runs with --calibration: leave it out.")
    return calibration is not None or flag("synthetic", options["synthetic"])


def _refuse_clock(options: Options, sets: int) -> None:
    """Refuse the options of the clock in a run that times nothing.

    Args:
        options: All options of `compress`, with their defaults.
        sets: The number of sets of shapes.

    Raises:
        InputError: One of them is given.
    """
    given = {
        "--threads": thread_count(options["threads"]) > 0,
        "a second --input-shape for an input": sets > 1,
        "--weights": options["weights"] is not None,
    }
    names = [name for name, is_given in given.items() if is_given]
    if names:
        raise InputError(
            f"{' and '.join(names)} would do nothing, as nothing is timed: pass --time or --budget latency, "
            f"or leave {'it' if len(names) == 1 else 'them'} out."
        )


def _patterns(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """Check globs; a single text stands for a sequence of one glob.

    Raises:
        InputError: A glob is not a text.
    """
    if isinstance(given, str):
        return (given,)
    require(name, given, (Iterable,), "names or globs")
    globs = tuple(given)
    for glob in globs:
        require(name, glob, (str,), "names or globs")
    return globs
