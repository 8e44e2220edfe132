"""The order of the stages: calibrate, search, settle, build, validate, time; repeated for slow models."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from onnx_lowrank import means
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.budgets import registry, timing
from onnx_lowrank.budgets.budget import Gauge, Meter, Run, Tools
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.core.outcome import Timing, Trial, Validation
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.engines.running import calibrating_engine
from onnx_lowrank.errors import BudgetError, LowRankError
from onnx_lowrank.files.keeping import Keeper
from onnx_lowrank.files.load import Model, ModelProto, check_unchanged, inlined, stored_bytes
from onnx_lowrank.files.scratch import roomy
from onnx_lowrank.layers.found import Found
from onnx_lowrank.layers.lowered import lowered
from onnx_lowrank.linalg.backend import one_blas_thread, resolve
from onnx_lowrank.material import Material, held_out, read, synthesized
from onnx_lowrank.progress import Progress, Silent
from onnx_lowrank.quantize.kind import Quantizer
from onnx_lowrank.report.report import Report
from onnx_lowrank.request import Request, Setting
from onnx_lowrank.stages import planning, reach, reporting, settling
from onnx_lowrank.stages.build import Built, build
from onnx_lowrank.stages.detail import details
from onnx_lowrank.stages.planning import Goal
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.stages.search import ANY, Search, check_target
from onnx_lowrank.validation import Validator
from onnx_lowrank.work.executor import Executor

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.calibration import Calibration
    from onnx_lowrank.calibrate.data import Samples

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Made:
    """The result of a session.

    Attributes:
        report: All results.
        plan: One choice for every layer.
        model: The compressed model; the input model after a dry run.
        resources: The model's files on disk. Close them with the model.
    """

    report: Report
    plan: Plan
    model: Model
    resources: ExitStack


def run(
    model: str | os.PathLike[str] | ModelProto, asked: Request, setting: Setting, progress: Progress
) -> Made:
    """Make the compressed model, its plan and its report.

    Args:
        model: A path or a model in memory; it is not changed.
        asked: The checked request.
        setting: The data, the tools and the bounds of the run.
        progress: Where to show progress.

    Raises:
        InputError: The model, or the data, is wrong.
        BudgetError: The ratio cannot be reached.
        ValidationError: The compressed model does not behave like the input model.
    """
    calibrated = setting.calibration is not None or setting.synthetic
    with one_blas_thread(solvers=calibrated), roomy(), ExitStack() as stack:
        if setting.synthetic:
            setting = synthesized(model, setting, progress)
        with progress.stage("find layers"):
            loaded = stack.enter_context(ExitStack())
            material = read(model, setting, stack, loaded)
            found = material.found
            if asked.plan is None:
                found = lowered(found, asked.styles)
                material = replace(material, found=found)
            means.check_engine(found.model, setting)
            if asked.training is not None:
                from onnx_lowrank.distil.distillation import check  # It loads PyTorch.

                check(found.model, material.shown, setting.device)
        backend = resolve(setting.device, means.operations(found))
        running = stack.enter_context(means.executor(setting, backend, found))
        asked.budget.check(found)
        quantizer = None
        if asked.then is not None:
            from onnx_lowrank.stages.quantizing import chosen  # It loads the calibration.

            quantizer = chosen(asked.then, found, asked.budget, calibrated=calibrated)
        stopwatch = None
        if asked.budget.is_measured or setting.time:
            caching = setting.cache
            stopwatch = timing.stopwatch(found.model, setting.tool, setting.threads, caching=caching)
        keeper = means.keeper(found.model, setting, backend.name, running.processors)
        sets = setting.sets[1:], setting.weights
        tools = Tools(stopwatch, material.shown, material.shapes, progress, *sets, quantizer)
        grid = Grid(asked.budget.on(found, tools), asked.block, asked.blocked)
        if asked.plan is None:
            reach.check(found, asked.ratio or 1.0, asked.recipes, grid)
        compared = timing.comparison(grid.costs, found.model, tools)
        if keeper is not None:
            from onnx_lowrank.work.kept import Kept  # It loads the work items of all stages.

            running = Kept(running, keeper)
        job = _Job(material, loaded, asked, setting, running, progress, grid, compared, keeper, quantizer)
        samples = material.samples
        try:
            return job.run(None if samples is None else job.calibrated(samples, stack))
        except LowRankError:
            raise
        except Exception:
            # An engine fails in its own way if a data file becomes shorter while it reads it.
            check_unchanged(found.model.stamps)
            raise


@dataclass(frozen=True, slots=True)
class _Job:
    """A request for a model with known layers."""

    material: Material
    loaded: ExitStack  # deletes the temporary file of the input model
    asked: Request
    setting: Setting
    executor: Executor
    progress: Progress
    grid: Grid[Meter]
    compared: timing.Comparison | None
    keeper: Keeper | None
    quantizer: Quantizer | None

    @property
    def validator(self) -> Validator:
        """Compares a compressed model with the input model."""
        return Validator(self.material, self.setting)

    @property
    def _first_validator(self) -> Validator:
        """Compares a model before its distillation, after which a bound on its error is judged."""
        setting = self.setting if self.asked.training is None else replace(self.setting, max_error=None)
        return Validator(self.material, setting)

    @property
    def gauge(self) -> Gauge | None:
        """The budget on the model if it measures times, else None."""
        return self.grid.costs.gauge

    @property
    def found(self) -> Found:
        """The model with its layers."""
        return self.material.found

    def calibrated(self, samples: Samples, stack: ExitStack) -> Calibration:
        """Measure the statistics of activations that the request needs."""
        # Most of the package serves calibration: a run without it starts much sooner.
        from onnx_lowrank.calibrate import measurement, passes
        from onnx_lowrank.calibrate.calibration import Calibration
        from onnx_lowrank.calibrate.originals import Originals
        from onnx_lowrank.calibrate.variety import varied

        feed = next(held_out(samples, 1))
        engine, outputs = calibrating_engine(self.found.model, feed, self.setting.provider)
        if self.asked.target is not None and outputs is not None:
            judged = samples.held or samples.count
            check_target(self.asked.target, self.found.model.name, outputs, feed, judged)
        bindings = self.found.bindings if self.asked.fits_activations else ()
        fitted = varied(self.found.model, samples, engine)
        keeper = None
        if self.keeper is not None and bindings:
            chosen = self.setting.include, self.setting.exclude, self.material.shapes
            data = self.found.model.sha256, passes.digest_of(fitted)
            keeper = self.keeper.of("calibration", engine.name, data, chosen)
        memory = self.setting.memory
        with self.progress.stage("activations", 1) as step:
            moments = measurement.measure(
                self.found.model,
                self.found.walk,
                bindings,
                fitted,
                engine,
                self.executor,
                memory=memory.moments,
                activations=memory.activations,
                keeper=keeper,
                step=step,
                # A replay measures what the run measured, so this cannot depend on the recipe.
                with_sums=Lowering.SUMMED in self.asked.budget.shares,
                looked_up=samples,
            )
        _log.debug(
            "calibration on %s; it runs on %s, %d layers are measured, %d are not",
            samples.description,
            engine.name,
            len(bindings) - len(moments.reasons),
            len(moments.reasons),
        )
        return Calibration(
            samples,
            fitted,
            engine,
            stack.enter_context(moments),
            Originals(memory.outputs),
            keeper=keeper,
            memory=memory,
        )

    def run(self, calibration: Calibration | None) -> Made:
        """Make the plan and, except in a dry run, the model; a slower model is made again with fewer layers.

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
            return self._result(scores, self._plan(scores), calibration)
        slower: list[float] = []
        while len(slower) < _CHANCES:
            with ExitStack() as stack:
                built, trials = self._made(scores, calibration)
                stack.enter_context(built.resources)
                if dry_run:
                    return self._result(scores, built.plan, calibration, trials)
                check_unchanged(self.found.model.stamps)
                with self.progress.stage("validate"):
                    validation = self._first_validator(built, calibration, trials)
                if self.asked.training is not None and self.gauge is None:
                    built, validation = self._distilled(built, validation, calibration)
                    stack.enter_context(built.resources)
                if self.quantizer is not None:
                    built, validation = self._quantized(self.quantizer, built, validation, calibration)
                    stack.enter_context(built.resources)
                times = self._timing(built)
                if self.gauge is None or times is None or not self._is_refused(built, times):
                    if self.asked.training is not None and self.gauge is not None:  # Numbers change no times.
                        built, validation = self._distilled(built, validation, calibration)
                        stack.enter_context(built.resources)
                    return self._result(
                        scores, built.plan, calibration, trials, built, validation, times, stack.pop_all()
                    )
                slower.append(times.ratio or 1.0)
                _log.debug("the model takes %.3f of the time: layers that lose time are put back", slower[-1])
                if len(slower) < _CHANCES:
                    self._put_back(self.gauge, built, calibration, slower[-1])
        raise BudgetError(
            f"The compressed model takes {min(slower):.3f} of the time of {self.found.model.name}, although "
            "its plan was measured to be faster, so nothing is written: try again when no other work "
            "disturbs the times.",
            1.0,
        )

    def _quantized(
        self, quantizer: Quantizer, built: Built, validation: Validation, calibration: Calibration | None
    ) -> tuple[Built, Validation]:
        """The quantized model, and its comparison with the input model and with the quantization alone."""
        from onnx_lowrank.stages.quantizing import Low, follow, undecomposed

        low, shapes, validator = Low(built, validation, calibration), self.material.shapes, self.validator
        beside = undecomposed(self.found, low, quantizer, self.progress, validator.errors)
        return follow(low, quantizer, self.executor, self.progress, shapes, validator, beside)

    def _distilled(
        self, built: Built, validation: Validation, calibration: Calibration | None
    ) -> tuple[Built, Validation]:
        """Train the model, without labels."""
        from onnx_lowrank.stages.distilling import Asked, follow
        from onnx_lowrank.stages.quantizing import Low

        wanted = self.asked.training
        if wanted is None:
            return built, validation
        asked = Asked(wanted.seconds, self.setting.device, wanted.known)
        low = Low(built, validation, calibration)
        built, validation = follow(low, asked, self.found, self.executor, self.progress, self.validator)
        done = validation.distilled
        if self.setting.max_error is not None and (done is None or not done.is_kept):
            self.validator(built, calibration, ())  # Its bound was not judged before.
        return built, validation

    def _is_refused(self, built: Built, times: Timing) -> bool:
        """Whether a model is refused because it is slower; a replayed plan is never refused."""
        can_refuse = self.asked.plan is None and bool(settling.options(built.plan))
        return can_refuse and times.ratio is not None and times.ratio > _REFUSED

    def _put_back(self, gauge: Gauge, built: Built, calibration: Calibration | None, reached: float) -> None:
        """Time each kind of layer with its final factors: the next plan keeps the layers that lose time."""
        plan = replace(built.plan, recover=False)  # Recovery changes factors, but not times.

        def ratio(rewritten: Mapping[str, Option]) -> float:
            choices = tuple(c if c.layer in rewritten else replace(c, option=None) for c in plan.choices)
            part = build(self.found, replace(plan, choices=choices), calibration, self.executor, Silent())
            with part.resources:
                try:
                    return gauge.ratio(part.rewritten.model)
                except (UnsupportedError, RejectedError):
                    return gauge.predicted(rewritten) / gauge.total

        with self.progress.stage("time kinds of layers", 1) as step:
            gauge.correct(settling.options(plan), reached, ratio, step)

    def _made(self, scores: Scores, calibration: Calibration | None) -> tuple[Built, tuple[Trial, ...]]:
        """The best model, and the trials if held-out inputs chose it."""
        if calibration is not None and self.asked.plan is None:
            return self._searched(scores, calibration)
        return build(self.found, self._plan(scores), calibration, self.executor, self.progress), ()

    def _searched(self, scores: Scores, calibration: Calibration) -> tuple[Built, tuple[Trial, ...]]:
        """The best model on held-out inputs, and the trials."""
        recipes = self.asked.recipes
        search = Search(self.found, scores, calibration, self.executor, self.progress)
        if self.asked.ratio is not None:
            built = search.best(recipes, self.asked.ratio)
        else:
            built = search.smallest(recipes, self.asked.target or ANY)
        return built, tuple(search.trials)

    def _plan(self, scores: Scores) -> Plan:
        if self.asked.plan is not None:
            return planning.replay(self.asked.plan, self.found.model, self.found.layers, self.grid.costs)
        goal = Goal(self.asked.ratio or 1.0, self.asked.recipes[0])
        return settling.make(self.found, goal, scores, self.progress)

    def _result(
        self,
        scores: Scores,
        plan: Plan,
        calibration: Calibration | None,
        trials: tuple[Trial, ...] = (),
        built: Built | None = None,
        validation: Validation | None = None,
        times: Timing | None = None,
        resources: ExitStack | None = None,
    ) -> Made:
        if times is None and self.gauge is not None:
            times = self.gauge.timing(settling.options(plan), None)
        if self.quantizer is not None and not plan.then:
            plan = plans.sealed(replace(plan, then=self.quantizer.kind))
        run = Run(
            self.found,
            plan,
            self.grid.costs,
            None if built is None else built.rewritten,
            built is not None and bool(built.merges),
            self.material.shapes,
            times,
            None if built is None else built.quantized,
            self.material.counted,
        )
        report = reporting.assemble(
            run,
            built,
            validation=validation,
            given=self.material.given is not None or calibration is not None,
            calibration=None if calibration is None else calibration.summary,
            trials=trials,
            target=self.asked.target or ANY,
            styles=self.asked.styles,
            details=details(scores, () if self.asked.plan else self.asked.recipes, plan),
        )
        resources = resources or ExitStack()
        model = self.found.model if built is None else built.model
        if model.temporary and stored_bytes(model) > _IN_MEMORY:
            resources.push(self.loaded.pop_all())
        else:
            model = inlined(model)
        if not model.files:
            resources.close()
        return Made(report, plan, model, resources)

    def _timing(self, built: Built) -> Timing | None:
        """The times of both models, a median of several if the new one seems slower; None if not needed."""
        model, chosen, gauge = built.model, settling.options(built.plan), self.gauge
        if gauge is None:
            if self.compared is None:
                return None
            with self.progress.stage("time"):
                return self.compared(model)
        with self.progress.stage("time"):
            first = gauge.timing(chosen, model)
            if not self._is_refused(built, first):
                return first
            again = [gauge.timing(chosen, model) for _ in range(_CHANCES - 1)]
        return sorted([first, *again], key=lambda measured: measured.ratio or 0)[len(again) // 2]


_IN_MEMORY = 2**28
"""Bytes up to which the made model is in memory if the input model was inline."""

_REFUSED = 1.02
"""A model that takes more than this share of the input model's time is slower; noise alone is smaller."""

_CHANCES = 3
"""How often a seemingly slower model is timed, since other work on the machine may have disturbed the first
time (the median counts); and the largest number of models that are made."""
