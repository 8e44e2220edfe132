"""What compress() is asked for: its arguments checked, one against the other."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from pathlib import Path
from types import NoneType
from typing import Any

from numpy.typing import NDArray

from onnx_lowrank import measures
from onnx_lowrank.budgets import registry
from onnx_lowrank.budgets.budget import Budget
from onnx_lowrank.calibrate.data import Source
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans, recipes
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.engines.runtime import runtime
from onnx_lowrank.errors import InputError
from onnx_lowrank.hardware import block
from onnx_lowrank.linalg.backend import Backend, resolve
from onnx_lowrank.stages.search import AUTO, Target

_log = logging.getLogger(__name__)

DEFAULT_RECIPE = "schatten"
"""The recipe that is used where nothing is known but the model; `passes/README.md` says why."""

DEFAULT_BUDGET = "params"

AUTO_RECIPE = "auto"
"""Stands for several recipes, of which held-out calibration inputs choose one."""

ALIGN_AUTO = "auto"
"""Stands for the blocks in which the execution provider computes."""

_LARGEST_SIZE = 2**63 - 1
_LARGEST_BLOCK = 1024
_MOST_THREADS = 1024
_MOST_WORKERS = 64


@dataclass(frozen=True, slots=True)
class Request:
    """What to make.

    Attributes:
        budget: What the ratio counts.
        block: What ranks are multiples of.
        recipes: The recipes to choose from; none where a plan is replayed.
        ratio: The ratio to reach; None where a target or a plan says it.
        target: What the outputs have to hold instead.
        plan: The plan to replay instead.
    """

    budget: Budget
    block: int = 1
    recipes: tuple[Recipe, ...] = ()
    ratio: float | None = None
    target: Target | None = None
    plan: Plan | None = None

    @property
    def fits_activations(self) -> bool:
        """Whether anything has to be known of the activations."""
        if self.plan is not None:
            return self.plan.factors is Fit.ACTIVATIONS
        return any(recipe.calibrated for recipe in self.recipes)

    @property
    def is_search(self) -> bool:
        """Whether models have to be made and judged to know the plan."""
        return self.target is not None or len(self.recipes) > 1


Inputs = str | Path | Mapping[str, NDArray[Any]]
"""An .npz file, or arrays by input name."""


@dataclass(frozen=True, slots=True)
class Setting:
    """On which data, with which tools and within which bounds it is made.

    Attributes:
        calibration: The inputs to fit to; None without.
        samples: The most of them to use; None for all.
        inputs: The inputs to compare on; None where the user gives none.
        shapes: Shapes of inputs, by name, which the model leaves open.
        include: Globs of the layers and nodes to decompose; all where there are none.
        exclude: Globs of the layers and nodes to leave alone.
        max_error: The largest relative error of an output to accept; None for any.
        backend: Where the linear algebra runs.
        provider: ONNX Runtime's execution provider.
        time: Whether the finished model is timed against the input model, whatever the budget.
        threads: How many threads compute one operator when times are measured; 0 leaves it to the runtime.
        cache: Whether times may be read from disk and written there.
        workers: How many processes compute what the layers need; 0 leaves it to threads.
        dry_run: Whether only the plan is made.
    """

    calibration: Source | None
    samples: int | None
    inputs: Inputs | None
    shapes: Mapping[str, tuple[int, ...]]
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    max_error: float | None
    backend: Backend
    provider: str
    time: bool
    threads: int
    cache: bool
    workers: int
    dry_run: bool


def request(
    ratio: float | None,
    recipe: str | Path | Recipe | None,
    budget: str | None,
    plan: str | os.PathLike[str] | Plan | None,
    target: Target | None,
    *,
    align: int | str | None,
    provider: str,
    calibrated: bool,
    recover: bool,
) -> Request:
    """Check what is asked for.

    Args:
        ratio: As in `compress`.
        recipe: As in `compress`.
        budget: As in `compress`.
        plan: As in `compress`.
        target: What the outputs have to hold, if anything.
        align: As in `compress`.
        provider: As in `compress`.
        calibrated: Whether there is calibration data.
        recover: As in `compress`.

    Raises:
        InputError: An argument is wrong, or does not go with another.
    """
    require("ratio", ratio, (Real, NoneType), "a number such as 0.5")
    require("recipe", recipe, (str, os.PathLike, Recipe, NoneType), "a name, a path or a Recipe")
    require("plan", plan, (str, os.PathLike, Plan, NoneType), "a path or a Plan")
    if sum(what is not None for what in (ratio, plan, target)) != 1:
        raise InputError(
            "Give either a ratio, such as --ratio 0.5, or a plan to replay with --plan FILE, or, with "
            "--calibration, --target-error or --target-agreement."
        )
    if plan is not None:
        if any(what is not None for what in (recipe, budget, align)):
            raise InputError(
                "A plan has its own recipe, budget and ranks: leave out --pass, --budget and --align."
            )
        return _replayed(plan, calibrated=calibrated, recover=recover)
    if ratio is not None and not 0 < ratio <= 1:
        raise InputError(f"The ratio is {ratio}, and has to be above 0 and at most 1: 0.5 keeps half.")
    counted = registry.named(DEFAULT_BUDGET if budget is None else budget)
    if align is None and counted.is_aligned:
        align = ALIGN_AUTO
    asked = Request(
        budget=counted,
        block=_block(align, provider),
        recipes=_recipes(recipe, calibrated=calibrated, recover=recover),
        ratio=None if ratio is None else float(ratio),
        target=target,
    )
    aim = target if ratio is None else f"ratio {ratio:g}"
    _log.debug("asked for %s of %s; ranks are multiples of %d", aim, counted.name, asked.block)
    return asked


def setting(
    asked: Request,
    *,
    calibration: Source | None,
    samples: int | None,
    inputs: Inputs | None,
    shapes: Mapping[str, Sequence[int]],
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    max_error: float | None,
    device: str,
    provider: str,
    time: bool,
    threads: int,
    cache: bool,
    workers: int,
    dry_run: bool,
) -> Setting:
    """Check with which data and tools it is to be made; see `compress` for the arguments.

    Raises:
        InputError: An argument is wrong, or the device or the execution provider is not there.
    """
    require("max_error", max_error, (Real, NoneType), "a number")
    if max_error is not None and not max_error >= 0:
        raise InputError(f"The largest error to accept is {max_error}, and has to be 0 or more.")
    require("inputs", inputs, (str, os.PathLike, Mapping, NoneType), "a path or arrays by input name")
    if _flag("time", time) and dry_run and not asked.budget.is_measured:
        raise InputError("--time times the finished model, and --dry-run makes none: leave one of them out.")
    made = Setting(
        calibration=calibration,
        samples=samples,
        inputs=inputs,
        shapes=_shapes(shapes),
        include=_patterns("include", include),
        exclude=_patterns("exclude", exclude),
        max_error=max_error,
        provider=provider,
        time=time,
        threads=thread_count(threads),
        workers=worker_count(workers),
        cache=_flag("cache", cache),
        backend=resolve(device),
        dry_run=dry_run,
    )
    if calibration is not None or asked.budget.is_measured or not dry_run:
        runtime(provider)
    return made


def _replayed(
    plan: str | os.PathLike[str] | Plan,
    *,
    calibrated: bool,
    recover: bool,
) -> Request:
    known = plan if isinstance(plan, Plan) else plans.read(plan)
    measures.named(known.measure)  # A Plan made in Python was never read, so nothing has checked the name.
    _log.debug("replays a plan of recipe %r for ratio %g of %s", known.recipe, known.ratio, known.budget)
    if known.factors is Fit.ACTIVATIONS and not calibrated:
        raise InputError("The plan's factors are fitted to calibration inputs: pass them with --calibration.")
    return Request(
        budget=registry.named(known.budget), plan=known if recover else replace(known, recover=False)
    )


def _block(align: int | str | None, provider: str) -> int:
    """What ranks are multiples of."""
    if align is None:
        return 1
    if align == ALIGN_AUTO:
        return block(provider)
    wrong = isinstance(align, bool) or not isinstance(align, Integral)
    if wrong or not 1 <= int(align) <= _LARGEST_BLOCK:
        raise InputError(
            f"The alignment is {str(align)[:60]!r}, and has to be {ALIGN_AUTO!r} or a whole number from 1 to "
            f"{_LARGEST_BLOCK}."
        )
    return int(align)


def _recipes(recipe: str | Path | Recipe | None, *, calibrated: bool, recover: bool) -> tuple[Recipe, ...]:
    """The recipes to choose from, without recovery where that is not wanted."""
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
        chosen = [recipe if isinstance(recipe, Recipe) else recipes.load(recipe)]
    for one in chosen:
        if one.calibrated and not calibrated:
            raise InputError(
                f"The recipe {one.name!r} needs calibration inputs: pass some with --calibration, or choose "
                "a recipe of weights alone (--list-passes)."
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


def target(error: float | None, agreement: float | None, *, calibrated: bool) -> Target | None:
    """Check what the outputs have to hold.

    Raises:
        InputError: A number is wrong, or there is no calibration data to judge by.
    """
    require("target_error", error, (Real, NoneType), "a number")
    require("target_agreement", agreement, (Real, NoneType), "a number")
    if error is None and agreement is None:
        return None
    if not calibrated:
        raise InputError("A target is judged on held-out calibration inputs: pass some with --calibration.")
    if error is not None and not error >= 0:
        raise InputError(f"The target error is {error}, and has to be 0 or more: 0.05 allows five per cent.")
    if agreement is not None and not 0 < agreement <= 1:
        raise InputError(
            f"The target agreement is {agreement}, and has to be above 0 and at most 1: 0.99 asks for 99 per "
            "cent."
        )
    return Target(error, agreement)


def is_calibrated(source: Source | None, samples: int | None, *, recover: bool) -> bool:
    """Whether there is calibration data; the arguments that mean something beside it only are checked.

    Raises:
        InputError: They are given without, or are wrong.
    """
    require("calibration", source, (object,), "a path, arrays by name, or feeds")
    require("calibration_samples", samples, (Integral, NoneType), "a whole number")
    _flag("recover", recover)
    if samples is not None and samples < 1:
        raise InputError(f"--calibration-samples is {samples}: pass 1 or more.")
    if source is None and samples is not None:
        raise InputError("--calibration-samples says how many to use of --calibration: pass that, too.")
    if source is None and not recover:
        raise InputError("--no-recover leaves out what only --calibration makes possible: leave it out.")
    return source is not None


def thread_count(given: int) -> int:
    """Check a number of threads.

    Raises:
        InputError: It is wrong.
    """
    require("threads", given, (Integral,), "a whole number")
    if not 0 <= given <= _MOST_THREADS:
        raise InputError(f"--threads is {given}: pass 1 to {_MOST_THREADS}, or 0 for what the runtime takes.")
    return int(given)


def _flag(name: str, given: bool) -> bool:
    if not isinstance(given, bool):
        raise InputError(f"{name} is {given!r}: give True or False.")
    return given


def worker_count(given: int) -> int:
    """Check a number of worker processes.

    Raises:
        InputError: It is wrong.
    """
    require("workers", given, (Integral,), "a whole number")
    if not 0 <= given <= _MOST_WORKERS:
        raise InputError(
            f"--workers is {given}: pass 1 to {_MOST_WORKERS}, or 0 for the threads of one process."
        )
    return int(given)


def require(name: str, value: object, kinds: tuple[type, ...], wanted: str) -> None:
    """Say what is wrong with an argument of the API, which nothing has parsed."""
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"{name} is {str(value)[:60]!r} of type {type(value).__name__}: give {wanted}.")
    if isinstance(value, str) and not value:
        raise InputError(f"{name} is an empty text: give {wanted}.")


def _shapes(given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Check the shapes of inputs.

    Raises:
        InputError: One is wrong.
    """
    require("input_shape", given, (Mapping,), "a mapping of input names to shapes")
    for name, shape in given.items():
        require(f"The shape of input {name!r}", shape, (Sequence,), "positive whole numbers")
        if not all(isinstance(n, Integral) and 0 < n <= _LARGEST_SIZE for n in shape):
            raise InputError(
                f"The shape of input {name!r} is {shape}, and has to be of positive whole numbers."
            )
    return {name: tuple(map(int, shape)) for name, shape in given.items()}


def _patterns(name: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """Check globs; one alone may stand for a sequence of one.

    Raises:
        InputError: They are no texts.
    """
    if isinstance(given, str):
        return (given,)
    require(name, given, (Iterable,), "names or globs")
    globs = tuple(given)
    for glob in globs:
        require(name, glob, (str,), "names or globs")
    return globs
