"""compress(): load → prepare → find layers → scores → allocate → factorize → rewrite → validate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice
from numbers import Real
from pathlib import Path
from types import NoneType
from typing import Any, Self

from numpy.typing import NDArray

from onnx_lowrank import request as arguments
from onnx_lowrank.budgets.latency import measured
from onnx_lowrank.budgets.latency.measured import Latency
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.calibrate import data, statistics
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.data import Samples, Source
from onnx_lowrank.core.option import Option
from onnx_lowrank.core.outcome import Calibrated, Timing, Trial, Validation
from onnx_lowrank.core.plan import Budget, Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.inputs import read as read_inputs
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.running import calibrating_engine
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.errors import BudgetError, InputError
from onnx_lowrank.files.atomic import replacing
from onnx_lowrank.files.load import Model, ModelProto, load, stored_bytes
from onnx_lowrank.files.save import save
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.hardware import cache_bytes
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.linalg.backend import Backend, one_blas_thread, resolve
from onnx_lowrank.probe.excerpt import excerpts
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.report.report import Report
from onnx_lowrank.request import Request
from onnx_lowrank.stages import plan as planner
from onnx_lowrank.stages import report as reporting
from onnx_lowrank.stages import settle as settling
from onnx_lowrank.stages.build import Built, build, judge
from onnx_lowrank.stages.check import Measured, validate
from onnx_lowrank.stages.plan import Goal
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.stages.search import Search, Target, check_target


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
        save(self.model, path)

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
    align: int | str | None = None,
    plan: str | os.PathLike[str] | Plan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    calibration: Source | None = None,
    calibration_samples: int | None = None,
    recover: bool = True,
    target_error: float | None = None,
    target_agreement: float | None = None,
    inputs: str | Path | Mapping[str, NDArray[Any]] | None = None,
    input_shape: Mapping[str, Sequence[int]] | None = None,
    max_error: float | None = None,
    device: str = "auto",
    provider: str = "CPUExecutionProvider",
    threads: int = 0,
    cache: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Make a model smaller by low-rank decomposition.

    Args:
        model: A path or a model in memory; it is not changed.
        ratio: Budget of the output over that of the input, above 0 and at most 1.
        recipe: Name of a recipe, path of a TOML file, or a recipe; "auto" tries several and keeps the best
            on held-out calibration inputs. By default "auto" with calibration, else `DEFAULT_RECIPE`.
        budget: What the ratio counts: "params" (the default), "macs" or "latency", the time that a run takes
            here.
        align: Consider only ranks that are multiples of this, and for convolutions only slices whose channels
            are; "auto" is what the provider computes in. By default any, and "auto" for latency.
        plan: A plan to replay, instead of ratio, recipe, budget and alignment.
        include: Globs of layer ids or node names; where there are any, only these are decomposed.
        exclude: Globs of layer ids or node names that are left alone.
        calibration: Inputs to fit to, without labels: an .npz or .npy file, a folder, arrays by name, an
            iterable of feeds, or an ONNX Runtime CalibrationDataReader; see `calibrate.data.open`.
        calibration_samples: How many of them to use at most.
        recover: Let recipes that say so recover each layer from the errors of those before it.
        target_error: Instead of a ratio, find the smallest model whose outputs on held-out calibration
            inputs have at most this error, relative to what varies in them (`OutputError.centred`).
        target_agreement: The same for the share of outputs that agree (rows of an embedding: that keep their
            nearest neighbour), above 0 and at most 1.
        inputs: An .npz file, or arrays by input name, on which the models are compared; by default
            held-out calibration inputs, or inputs that are made from the graph.
        input_shape: Shapes by input name, where the model leaves dimensions open.
        max_error: Bound on the largest relative error over the outputs.
        device: Where the linear algebra runs: "auto", "cpu" or "cuda".
        provider: ONNX Runtime's execution provider, for calibration, for the comparison and for times.
        threads: How many threads compute one operator when times are measured; 0 leaves it to the runtime.
        cache: Whether times of layers may be read from the user's cache folder and written there.
        dry_run: Make the plan and the report only; the model stays as it is.
        progress: Where to show progress; by default nowhere.

    Returns:
        The compressed model with its report and plan. Where the model has external data, close the
        result, or use it in a `with` block.

    Raises:
        InputError: An argument, the calibration data or the model is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not do what the input model does.
    """
    # Whatever can be wrong is better told before the work than after it.
    calibrated = calibration is not None
    arguments.require("calibration", calibration, (object,), "a path, arrays by name, or feeds")
    arguments.check_calibration(calibration_samples, calibrated=calibrated, recover=recover)
    target = arguments.target(target_error, target_agreement, calibrated=calibrated)
    asked = arguments.request(
        ratio,
        recipe,
        budget,
        plan,
        target,
        align=align,
        provider=provider,
        calibrated=calibrated,
        recover=recover,
    )
    arguments.require("max_error", max_error, (Real, NoneType), "a number")
    if max_error is not None and not max_error >= 0:
        raise InputError(f"The largest error to accept is {max_error}, and has to be 0 or more.")
    arguments.require(
        "inputs", inputs, (str, os.PathLike, Mapping, NoneType), "a path or arrays by input name"
    )
    shapes = arguments.shapes(input_shape or {})
    globs = arguments.patterns("include", include), arguments.patterns("exclude", exclude)
    threads = arguments.threads(threads)
    if not isinstance(cache, bool):
        raise InputError(f"cache is {cache!r}: give True or False.")
    backend = resolve(device)
    is_timed = asked.grid.budget is Budget.LATENCY
    if calibrated or is_timed or not dry_run:
        runtime(provider)
    progress = progress or Silent()
    with one_blas_thread(), ExitStack() as stack:
        with progress.stage("find layers"):
            loaded = load(model)
            given = None if inputs is None else read_inputs(inputs, specs(loaded.proto))
            samples = None
            if calibration is not None:
                samples = stack.enter_context(
                    data.open(calibration, specs(loaded.proto), calibration_samples)
                )
            # The inputs to compare on tell the shapes that nobody stated.
            shown = given or (next(_held_out(samples, 1)) if samples is not None else {})
            if any(array.size for array in shown.values()):
                # Not those with elements alone: a decoder's past has none at its first call.
                shapes = {n: array.shape for n, array in shown.items() if 0 not in array.shape[:1]} | shapes
            found = find_layers(loaded, shapes, *globs)
        if is_timed:
            planner.check_shapes(found)
        if asked.plan is None:
            planner.check_reach(found, asked.ratio or 1.0, asked.recipes, asked.grid)
        stopwatch = None
        if is_timed or not dry_run:
            # Others share the cache, and activations need room in it, too.
            warm = stored_bytes(loaded) <= cache_bytes() / 2
            stopwatch = Stopwatch(runtime(provider), threads, warm=warm, caching=cache)
        latency = None
        if is_timed and stopwatch is not None:
            with progress.stage("time the model"):
                latency = measured.start(found, shown, shapes, stopwatch)
        job = _Job(
            found, asked, backend, progress, provider, shapes, max_error, given, shown, stopwatch, latency
        )
        return job.run(None if samples is None else job.calibrated(samples, stack), dry_run=dry_run)


@dataclass(frozen=True, slots=True)
class _Job:
    """A request on a model whose layers are found."""

    found: Found
    asked: Request
    backend: Backend
    progress: Progress
    provider: str
    shapes: Mapping[str, tuple[int, ...]]
    max_error: float | None
    given: Feed | None
    shown: Feed
    stopwatch: Stopwatch | None
    latency: Latency | None

    def calibrated(self, samples: Samples, stack: ExitStack) -> Calibration:
        """Measure what the request needs to know of the activations."""
        feed = next(_held_out(samples, 1))
        engine, outputs = calibrating_engine(self.found.model, feed, self.provider)
        if self.asked.target is not None and outputs is not None:
            judged = samples.held or samples.count
            check_target(self.asked.target, self.found.model.name, outputs, feed, judged)
        bindings = self.found.bindings if self.asked.fits_activations else ()
        with self.progress.stage("activations", 1) as step:
            moments = statistics.measure(
                self.found.model, self.found.walk, bindings, samples, engine, step=step
            )
        return Calibration(samples, engine, stack.enter_context(moments))

    def run(self, calibration: Calibration | None, *, dry_run: bool) -> Result:
        """Make the plan, and the model where it is wanted; a slower one is made anew without what loses.

        Raises:
            BudgetError: The ratio cannot be reached.
        """
        scores = Scores(self.found, self.asked.grid, self.backend, self.progress, calibration, self.latency)
        if dry_run and not self.asked.is_search:
            return self._result(self._plan(scores), calibration)
        slower: list[float] = []
        while len(slower) < _CHANCES:
            with ExitStack() as stack:
                built, trials = self._made(scores, calibration)
                stack.enter_context(built.resources)
                if dry_run:
                    return self._result(built.plan, calibration, trials)
                with self.progress.stage("validate"):
                    validation = self._validated(built, calibration, trials)
                with self.progress.stage("time"):
                    timing = self._timing(built)
                if self.latency is None or timing is None or not self._is_refused(built, timing):
                    return self._result(
                        built.plan, calibration, trials, built, validation, timing, stack.pop_all()
                    )
                slower.append(timing.ratio or 1.0)
                if len(slower) < _CHANCES:
                    self._put_back(self.latency, built, calibration, slower[-1])
        raise BudgetError(
            f"The compressed model takes {min(slower):.3f} of the time of {self.found.model.name}, although "
            "its plan was faster when it was measured, so nothing is written: try again when no other work "
            "disturbs the times.",
            1.0,
        )

    def _is_refused(self, built: Built, timing: Timing) -> bool:
        """Whether a model is slower, and nobody wants it: who replays a plan does so wherever that is."""
        is_own = self.asked.plan is None and bool(settling.options(built.plan))
        return is_own and timing.ratio is not None and timing.ratio > _REFUSED

    def _put_back(
        self, latency: Latency, built: Built, calibration: Calibration | None, reached: float
    ) -> None:
        """Measure each kind of layer with the factors that it has: the next plan keeps those that lose."""
        plan = replace(built.plan, recover=False)  # which changes factors, not times

        def ratio(own: Mapping[str, Option]) -> float:
            choices = tuple(c if c.layer in own else replace(c, option=None) for c in plan.choices)
            part = build(self.found, replace(plan, choices=choices), calibration, self.backend, Silent())
            with part.resources:
                try:
                    return latency.ratio(part.rewritten.model)
                except (UnsupportedError, RejectedError):
                    return latency.predicted(own) / latency.whole

        with self.progress.stage("time kinds of layers", 1) as step:
            latency.correct(settling.options(plan), reached, ratio, step)

    def _made(self, scores: Scores, calibration: Calibration | None) -> tuple[Built, tuple[Trial, ...]]:
        """The best model that is found, and what was tried where held-out inputs tell which that is."""
        if calibration is not None and self.asked.plan is None:
            return self._searched(scores, calibration)
        return build(self.found, self._plan(scores), calibration, self.backend, self.progress), ()

    def _searched(self, scores: Scores, calibration: Calibration) -> tuple[Built, tuple[Trial, ...]]:
        """The best model that held-out inputs show, and what was tried."""
        budget, recipes = self.asked.grid.budget, self.asked.recipes
        search = Search(self.found, budget, scores, calibration, self.backend, self.progress)
        if self.asked.ratio is not None:
            built = search.best(recipes, self.asked.ratio)
        else:
            built = search.smallest(recipes, self.asked.target or Target())
        return built, tuple(search.trials)

    def _plan(self, scores: Scores) -> Plan:
        if self.asked.plan is not None:
            return planner.replay(self.asked.plan, self.found)
        goal = Goal(self.asked.ratio or 1.0, self.asked.recipes[0], self.asked.grid.budget)
        return settling.make(self.found, goal, scores, self.progress)

    def _result(
        self,
        plan: Plan,
        calibration: Calibration | None,
        trials: tuple[Trial, ...] = (),
        built: Built | None = None,
        validation: Validation | None = None,
        timing: Timing | None = None,
        resources: ExitStack | None = None,
    ) -> Result:
        if timing is None and self.latency is not None:
            timing = self.latency.timing(settling.options(plan), None)
        report = reporting.assemble(
            self.found,
            plan,
            None if built is None else built.rewritten,
            {} if built is None else built.certificates,
            validation,
            self.given is not None or calibration is not None,
            calibration=None if calibration is None else _summary(calibration),
            trials=trials,
            fits={} if built is None else built.fits,
            target_error=self.asked.target.error if self.asked.target else None,
            target_agreement=self.asked.target.agreement if self.asked.target else None,
            timing=timing,
            merges=() if built is None else built.merges,
            macs_after=self._macs(built),
        )
        model = self.found.model if built is None else built.rewritten.model
        return Result(report, plan, model, resources or ExitStack())

    def _macs(self, built: Built | None) -> int | None:
        """MACs of a model in which operators were multiplied, of which the plan knows nothing; else None."""
        if built is None or not built.merges:
            return None
        return find_layers(built.rewritten.model, self.shapes, (), ()).macs()

    def _timing(self, built: Built) -> Timing | None:
        """How long both models take; None where that cannot be measured and nobody has asked for it."""
        model = built.rewritten.model
        chosen = settling.options(built.plan)
        if self.latency is None:
            if not chosen or self.stopwatch is None:
                return None
            return measured.compare(self.found.model, model, self.shown, self.shapes, self.stopwatch)
        timing = self.latency.timing(chosen, model)
        if not self._is_refused(built, timing):
            return timing
        again = [self.latency.timing(chosen, model) for _ in range(_CHANCES - 1)]
        return sorted([timing, *again], key=lambda of: of.ratio or 0)[len(again) // 2]

    def _validated(
        self, built: Built, calibration: Calibration | None, trials: tuple[Trial, ...]
    ) -> Validation:
        rewritten = built.rewritten
        bindings = {binding.layer.id: binding for binding in self.found.bindings}

        @cache
        def new_walk() -> Walk:
            return Walk(rewritten.model.proto)

        shared = {layer for merged in built.merges for layer in merged.layers}

        def alone(layer: str) -> tuple[ModelProto, ModelProto] | None:
            if layer in shared:
                return None
            chain = rewritten.chains[layer][0]
            model, walk = self.found.model, self.found.walk
            return excerpts(model, walk, rewritten.model, new_walk(), bindings[layer], chain)

        known = None
        if self.given is None and calibration is not None:
            chosen = next((trial.outputs for trial in trials if trial.chosen), None)
            outputs = chosen or judge(self.found, built, calibration)
            samples = calibration.samples
            source = (
                f"{samples.held or samples.count} {'held-out ' if samples.held else ''}calibration inputs"
            )
            known = Measured(outputs, tuple(_held_out(samples, _SHOWN)), source)
        last = {layer: tuple(chain[-1] for chain in chains) for layer, chains in rewritten.chains.items()}
        return validate(
            self.found.model,
            rewritten.model,
            last,
            alone=alone,
            inputs=self.given,
            measured=known,
            input_shapes=self.shapes,
            provider=self.provider,
            max_error=self.max_error,
        )


_REFUSED = 1.02
"""A model that takes more than this of the input model's time is slower, and not by noise alone."""

_CHANCES = 3
"""How often a model is timed that seems to be slower, as other work on the machine may have made it so (the
median counts), and how many models are made at most."""

_SHOWN = 16
"""Calibration samples that show which layers run."""


def _held_out(samples: Samples, number: int) -> Iterator[Feed]:
    """So many calibration inputs, one by one, held-out ones where there are any."""
    return islice((batch.feed for batch in samples.batches(1) if batch.held or not samples.held), number)


def _summary(calibration: Calibration) -> Calibrated:
    samples, reasons = calibration.samples, calibration.statistics.reasons
    engine = calibration.engine
    known = isinstance(engine, Runtime)
    slow = () if known else (f"ONNX Runtime cannot run the model, and {engine.name} calibrates it slowly.",)
    return Calibrated(
        source=samples.description,
        samples=samples.count,
        held=samples.held,
        unmeasured=tuple(reasons.items()),
        warnings=(*samples.warnings, *slow),
    )
