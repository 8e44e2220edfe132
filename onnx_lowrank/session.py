"""The loops that go round: calibrate, search, settle, build, validate, time, put back."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache
from itertools import islice

from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets import registry
from onnx_lowrank.budgets.budget import Gauge, Meter, Tools
from onnx_lowrank.budgets.latency import whole
from onnx_lowrank.budgets.latency.stopwatch import Stopwatch
from onnx_lowrank.budgets.latency.whole import Whole
from onnx_lowrank.calibrate import data, statistics
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.data import Samples
from onnx_lowrank.core.option import Option
from onnx_lowrank.core.outcome import Calibrated, Timing, Trial, Validation
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.inputs import read as read_inputs
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.running import calibrating_engine
from onnx_lowrank.engines.runtime import Runtime, runtime
from onnx_lowrank.errors import BudgetError
from onnx_lowrank.files.load import Model, ModelProto, inlined, load, stored_bytes
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.hardware import cache_bytes
from onnx_lowrank.layers.found import Found, find_layers
from onnx_lowrank.linalg.backend import one_blas_thread
from onnx_lowrank.logs import DETAIL, some
from onnx_lowrank.probe.excerpt import excerpts
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.report.report import Report
from onnx_lowrank.request import Request, Setting
from onnx_lowrank.stages import plan as planner
from onnx_lowrank.stages import report as reporting
from onnx_lowrank.stages import settle as settling
from onnx_lowrank.stages.build import Built, build, judge
from onnx_lowrank.stages.check import Measured, validate
from onnx_lowrank.stages.plan import Goal
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.stages.search import Search, Target, check_target
from onnx_lowrank.work.executor import Executor, executor

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """What a session makes.

    Attributes:
        report: Everything there is to say about it.
        plan: One choice for every layer.
        model: The compressed model; the input model where it was a dry run.
        resources: What the model keeps on disk; to be closed with it.
    """

    report: Report
    plan: Plan
    model: Model
    resources: ExitStack


def run(
    model: str | os.PathLike[str] | ModelProto, asked: Request, setting: Setting, progress: Progress
) -> Made:
    """Make what is asked for.

    Args:
        model: A path or a model in memory; it is not changed.
        asked: What to make.
        setting: On which data, with which tools and within which bounds.
        progress: Where to show progress.

    Raises:
        InputError: The model, or the data, is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not do what the input model does.
    """
    executing = executor(setting.workers, setting.backend)
    with one_blas_thread(), executing as running, ExitStack() as stack:
        with progress.stage("find layers"):
            material = _read(model, setting, stack)
        found = material.found
        asked.budget.check(found)
        stopwatch = _stopwatch(found.model, asked, setting)
        tools = Tools(stopwatch, material.shown, material.shapes, progress)
        grid = Grid(asked.budget.on(found, tools), asked.block)
        if asked.plan is None:
            planner.check_reach(found, asked.ratio or 1.0, asked.recipes, grid)
        job = _Job(material, asked, setting, running, progress, grid, _clocked(material, tools, grid))
        samples = material.samples
        return job.run(None if samples is None else job.calibrated(samples, stack))


@dataclass(frozen=True, slots=True)
class _Material:
    """A model and the data that came with it, read and checked.

    Attributes:
        found: The model with its layers.
        samples: The calibration data.
        given: The inputs to compare on that the user gave.
        shown: Inputs of the user's, from wherever there are any; else empty.
        shapes: The shapes of inputs for which the layers were found, by name.
    """

    found: Found
    samples: Samples | None
    given: Feed | None
    shown: Feed
    shapes: Mapping[str, tuple[int, ...]]


def _read(source: str | os.PathLike[str] | ModelProto, setting: Setting, stack: ExitStack) -> _Material:
    model = load(source, stack)
    wanted = specs(model.proto)
    given = None if setting.inputs is None else read_inputs(setting.inputs, wanted)
    samples = None
    if setting.calibration is not None:
        samples = stack.enter_context(data.open_samples(setting.calibration, wanted, setting.samples))
    # The inputs to compare on tell the shapes that nobody stated.
    shown = given or (next(_held_out(samples, 1)) if samples is not None else {})
    shapes = dict(setting.shapes)
    if any(array.size for array in shown.values()):
        # Not those with elements alone: a decoder's past has none at its first call.
        shapes = {n: array.shape for n, array in shown.items() if 0 not in array.shape[:1]} | shapes
    found = find_layers(model, shapes, setting.include, setting.exclude)
    _log_found(found)
    return _Material(found, samples, given, shown, shapes)


def _log_found(found: Found) -> None:
    name, layers = found.model.name, len(found.layers)
    _log.debug("%r: %d layers, %d operators skipped", name, layers, len(found.skipped))
    reasons: dict[str, list[str]] = {}
    for item in found.skipped:
        reasons.setdefault(item.reason, []).append(item.name or item.weight or item.op)
    for reason, names in reasons.items():
        _log.debug("skipped %d: %s (%s)", len(names), reason, some(names))
    for layer in found.layers:
        folds = "/".join(layer.folds)
        _log.log(DETAIL, "layer %r: %s of %s, folds %s", layer.id, layer.op, layer.shape, folds)


def _stopwatch(model: Model, asked: Request, setting: Setting) -> Stopwatch | None:
    """What measures times; None where nobody asks for them."""
    if not (asked.budget.is_measured or setting.time):
        return None
    # Others share the cache, and activations need room in it, too.
    warm = stored_bytes(model) <= cache_bytes() / 2
    return Stopwatch(runtime(setting.provider), setting.threads, warm=warm, caching=setting.cache)


def _clocked(material: _Material, tools: Tools, grid: Grid[Meter]) -> Whole | None:
    """The input model, to time the finished one against, where the budget itself does not measure."""
    if tools.stopwatch is None or isinstance(grid.costs, Gauge):
        return None
    with tools.progress.stage("time the model"):
        return whole.start(material.found.model, tools.feed, tools.shapes, tools.stopwatch)


@dataclass(frozen=True, slots=True)
class _Job:
    """A request on a model whose layers are found."""

    material: _Material
    asked: Request
    setting: Setting
    executor: Executor
    progress: Progress
    grid: Grid[Meter]
    clocked: Whole | None

    @property
    def gauge(self) -> Gauge | None:
        """The budget on the model, where it measures."""
        return self.grid.costs if isinstance(self.grid.costs, Gauge) else None

    @property
    def found(self) -> Found:
        """The model with its layers."""
        return self.material.found

    def calibrated(self, samples: Samples, stack: ExitStack) -> Calibration:
        """Measure what the request needs to know of the activations."""
        feed = next(_held_out(samples, 1))
        engine, outputs = calibrating_engine(self.found.model, feed, self.setting.provider)
        if self.asked.target is not None and outputs is not None:
            judged = samples.held or samples.count
            check_target(self.asked.target, self.found.model.name, outputs, feed, judged)
        bindings = self.found.bindings if self.asked.fits_activations else ()
        with self.progress.stage("activations", 1) as step:
            moments = statistics.measure(
                self.found.model,
                self.found.walk,
                bindings,
                samples,
                engine,
                self.executor.threads,
                step=step,
            )
        _log.debug(
            "calibration on %s; it runs on %s, %d layers are measured, %d are not",
            samples.description,
            engine.name,
            len(bindings) - len(moments.reasons),
            len(moments.reasons),
        )
        return Calibration(samples, engine, stack.enter_context(moments))

    def run(self, calibration: Calibration | None) -> Made:
        """Make the plan, and the model where it is wanted; a slower one is made anew without what loses.

        Raises:
            BudgetError: The ratio cannot be reached.
        """
        scores = Scores(
            self.found.model,
            self.found.walk,
            self.found.bindings,
            self.grid,
            self.executor,
            self.progress,
            calibration,
            lambda name: registry.named(name).on(self.found),
        )
        dry_run = self.setting.dry_run
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
                timing = self._timing(built)
                if self.gauge is None or timing is None or not self._is_refused(built, timing):
                    return self._result(
                        built.plan, calibration, trials, built, validation, timing, stack.pop_all()
                    )
                slower.append(timing.ratio or 1.0)
                _log.debug("the model takes %.3f of the time: what loses in it is put back", slower[-1])
                if len(slower) < _CHANCES:
                    self._put_back(self.gauge, built, calibration, slower[-1])
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

    def _put_back(self, gauge: Gauge, built: Built, calibration: Calibration | None, reached: float) -> None:
        """Measure each kind of layer with the factors that it has: the next plan keeps those that lose."""
        plan = replace(built.plan, recover=False)  # which changes factors, not times

        def ratio(own: Mapping[str, Option]) -> float:
            choices = tuple(c if c.layer in own else replace(c, option=None) for c in plan.choices)
            part = build(self.found, replace(plan, choices=choices), calibration, self.executor, Silent())
            with part.resources:
                try:
                    return gauge.ratio(part.rewritten.model)
                except (UnsupportedError, RejectedError):
                    return gauge.predicted(own) / gauge.total

        with self.progress.stage("time kinds of layers", 1) as step:
            gauge.correct(settling.options(plan), reached, ratio, step)

    def _made(self, scores: Scores, calibration: Calibration | None) -> tuple[Built, tuple[Trial, ...]]:
        """The best model that is found, and what was tried where held-out inputs tell which that is."""
        if calibration is not None and self.asked.plan is None:
            return self._searched(scores, calibration)
        return build(self.found, self._plan(scores), calibration, self.executor, self.progress), ()

    def _searched(self, scores: Scores, calibration: Calibration) -> tuple[Built, tuple[Trial, ...]]:
        """The best model that held-out inputs show, and what was tried."""
        recipes = self.asked.recipes
        search = Search(self.found, scores, calibration, self.executor, self.progress)
        if self.asked.ratio is not None:
            built = search.best(recipes, self.asked.ratio)
        else:
            built = search.smallest(recipes, self.asked.target or Target())
        return built, tuple(search.trials)

    def _plan(self, scores: Scores) -> Plan:
        if self.asked.plan is not None:
            return planner.replay(self.asked.plan, self.found, self.grid.costs)
        goal = Goal(self.asked.ratio or 1.0, self.asked.recipes[0])
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
    ) -> Made:
        if timing is None and self.gauge is not None:
            timing = self.gauge.timing(settling.options(plan), None)
        report = reporting.assemble(
            self.found,
            plan,
            None if built is None else built.rewritten,
            {} if built is None else built.certificates,
            validation,
            self.material.given is not None or calibration is not None,
            calibration=None if calibration is None else _summary(calibration),
            trials=trials,
            fits={} if built is None else built.fits,
            target_error=self.asked.target.error if self.asked.target else None,
            target_agreement=self.asked.target.agreement if self.asked.target else None,
            timing=timing,
            merges=() if built is None else built.merges,
            meter=self.grid.costs,
            shapes=self.material.shapes,
        )
        resources = resources or ExitStack()
        model = inlined(self.found.model if built is None else built.rewritten.model)
        if not model.files:
            resources.close()
        return Made(report, plan, model, resources)

    def _timing(self, built: Built) -> Timing | None:
        """How long both models take, the median of several where it seems to be slower; None if not asked."""
        if self.gauge is None and self.clocked is None:
            return None
        model, chosen = built.rewritten.model, settling.options(built.plan)
        with self.progress.stage("time"):
            if self.gauge is None:
                return None if self.clocked is None else self.clocked.timing(model)
            timing = self.gauge.timing(chosen, model)
            if not self._is_refused(built, timing):
                return timing
            again = [self.gauge.timing(chosen, model) for _ in range(_CHANCES - 1)]
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
        if self.material.given is None and calibration is not None:
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
            inputs=self.material.given,
            measured=known,
            input_shapes=self.material.shapes,
            provider=self.setting.provider,
            max_error=self.setting.max_error,
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
