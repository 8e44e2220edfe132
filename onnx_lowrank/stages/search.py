"""The search for a recipe or a ratio: it makes compressed models and judges them on held-out inputs.

The best recipe differs by model and by ratio. Held-out calibration inputs show the best one without labels.
A model is deleted as soon as another is known to be better.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import TYPE_CHECKING, Any

from onnx_lowrank.core.outcome import Trial
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.engines.compare import compare
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.pasts import caches
from onnx_lowrank.errors import BudgetError, InputError, ValidationError
from onnx_lowrank.layers.found import Layered
from onnx_lowrank.progress import Labelled, Progress
from onnx_lowrank.report import words
from onnx_lowrank.stages import settling
from onnx_lowrank.stages.build import Built, build, judge
from onnx_lowrank.stages.planning import Goal
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.work.executor import Executor

if TYPE_CHECKING:
    from onnx_lowrank.calibrate.calibration import Calibration

_log = logging.getLogger(__name__)

AUTO = ("output", "activation", "schatten")
"""The recipes that `auto` tries; `passes/README.md` gives the reasons."""

_PRECISION = 128
"""A search ends when at most 1/128 of the ratio found lies between it and a ratio that misses the target."""

_RETRIED = 8
"""A search tries all recipes again once it knows the ratio to 1/8: another recipe may be best there."""


@dataclass(frozen=True, slots=True)
class Target:
    """The quality that the compressed model's outputs must have on held-out calibration inputs.

    Attributes:
        error: The largest allowed error of an output, centred if the output varies; None for any.
        agreement: The least allowed agreement of the outputs that have one (of nearest neighbours for an
            embedding); None for any.
    """

    error: float | None = None
    agreement: float | None = None

    def holds(self, trial: Trial) -> bool:
        """Whether a trial meets the target; a figure that was not measured does not meet it."""
        if not trial.outputs:
            return False
        error = inf if trial.error is None else trial.error
        if self.error is not None and error > self.error:
            return False
        agreement = 0.0 if trial.agreement is None else trial.agreement
        return self.agreement is None or agreement >= self.agreement

    def loss(self, trial: Trial) -> tuple[float, ...]:
        """The loss of a trial; a smaller loss is better.

        Trials that meet the target come first. Then the error decides, or the agreement if the target asks
        only for that; the other figure decides between equal or unknown ones.
        """
        error, disagreement = inf if trial.error is None else trial.error, -(trial.agreement or 0.0)
        by_error = self.error is not None or self.agreement is None
        order = (error, disagreement) if by_error else (disagreement, error)
        return (0.0 if self.holds(trial) else 1.0, *order)


ANY = Target()
"""No target: every model is good enough."""


_CHOICE = 3
"""The fewest rows of an embedding among which nearest neighbours can disagree."""


def check_target(target: Target, model: str, outputs: Mapping[str, Any], feed: Feed, samples: int) -> None:
    """Check that a target can be judged by a model's outputs.

    Args:
        target: The target.
        model: The name of the input model.
        outputs: Its outputs.
        feed: The inputs that gave these outputs, one sample.
        samples: The number of samples on which the target is judged.

    Raises:
        InputError: No output is fit for it.
    """
    whole = Trial("", 1.0, outputs=compare(outputs, outputs, feed))
    missing = []
    if target.error is not None and whole.error is None:
        missing.append("an error, which takes floats: leave --target-error out")
    is_embedding = any(output.cosine is not None for output in whole.outputs)
    if target.agreement is not None and whole.agreement is None and not (is_embedding and samples >= _CHOICE):
        missing.append(
            "an agreement, which takes classes, integers or an embedding of three samples or more: leave "
            "--target-agreement out"
        )
    if missing:
        raise InputError(
            f"The target cannot be judged, as no output of {model} has {', nor '.join(missing)}."
        )


@dataclass(frozen=True, slots=True)
class _Outcome:
    built: Built
    trial: Trial


class Search:
    """Tries recipes and ratios on one model.

    Attributes:
        trials: All trials, in order.
    """

    def __init__(
        self,
        source: Layered,
        scores: Scores,
        calibration: Calibration,
        executor: Executor,
        progress: Progress,
    ) -> None:
        self.trials: list[Trial] = []
        self._made: list[ExitStack] = []
        self._judged: dict[Hashable, Trial] = {}
        self._source = source
        self._scores = scores
        self._calibration = calibration
        self._executor = executor
        self._progress = progress

    def best(self, recipes: Sequence[Recipe], ratio: float) -> Built:
        """The model of least held-out error over several recipes; the best one is also tried with recovery.

        Recovery is judged layer by layer, so only the whole model shows whether it was worth it.

        Raises:
            BudgetError: No recipe reaches the ratio.
            ValidationError: All models within the ratio give NaN or Inf.
        """
        with self._deleted_on_error():
            return self._chosen(self._best(recipes, ratio, Target()))

    def _best(self, recipes: Sequence[Recipe], ratio: float, target: Target) -> _Outcome:
        """As `best`, for a target: all recipes run without recovery (quick), then the best runs with it."""
        best: _Outcome | None = None
        self._judged.clear()  # the models of an earlier ratio may be deleted
        errors: list[BudgetError | ValidationError] = []
        found: list[tuple[tuple[float, ...], Recipe, Plan]] = []
        for recipe in recipes:
            outcome = self._tried(replace(recipe, recover=False), ratio, errors)
            if outcome is not None:
                best = outcome if best is None else _better(best, outcome, target)
                found.append((target.loss(outcome.trial), recipe, outcome.built.plan))
        recovering = [trial for trial in found if trial[1].recover]
        leading = min(recovering, key=lambda trial: trial[0], default=None)
        if leading is not None and self._recovers(leading[2]):
            _, recipe, plan = leading
            # Not planned again: measured times would give another plan, and the comparison would be unfair.
            plan = plans.sealed(replace(plan, recover=True))
            outcome = self._tried(recipe, ratio, errors, plan)
            if outcome is not None:
                best = outcome if best is None else _better(best, outcome, target)
        if best is None:
            raise min(errors, key=_reach)
        return best

    def _recovers(self, plan: Plan) -> bool:
        """Whether recovery fits a layer of a plan anew; without one, it would make the same model again."""
        from onnx_lowrank.stages.recover import can_recover  # Runs without calibration never recover.

        source, statistics = self._source, self._calibration.statistics
        chosen = {choice.layer for choice in plan.choices if choice.option is not None}
        rewritten = [binding for binding in source.bindings if binding.layer.id in chosen]
        return any(can_recover(source.model, source.walk, b, statistics) for b in rewritten)

    def _tried(
        self,
        recipe: Recipe,
        ratio: float,
        errors: list[BudgetError | ValidationError],
        plan: Plan | None = None,
    ) -> _Outcome | None:
        """The outcome of a recipe; None on failure: a trial then gives the reason, and `errors` the error."""
        try:
            return self._try(recipe, ratio, plan)
        except (BudgetError, ValidationError) as error:
            self.trials.append(Trial(recipe.name, ratio, recipe.recover, note=str(error)))
            errors.append(error)
            return None

    def smallest(self, recipes: Sequence[Recipe], target: Target) -> Built:
        """The model of the smallest ratio that meets a target, among the ratios that bisection tries.

        Errors need not change steadily with the ratio, so a smaller ratio may meet the target, too. The
        recipe that is best at ratio ½ is used until all recipes are tried again near the end.

        Raises:
            ValidationError: No model meets the target, not even the one of ratio 1.
        """
        with self._deleted_on_error():
            held = self._bisected(recipes, target) or self._best(recipes, 1.0, target)
            if not target.holds(held.trial):
                raise ValidationError(
                    "Not even the model of ratio 1 meets the target, because its outputs change from run to "
                    "run: choose the other target, or a ratio."
                )
            return self._chosen(held)

    def _bisected(self, recipes: Sequence[Recipe], target: Target) -> _Outcome | None:
        """The model of the smallest ratio below 1 that meets a target, or None."""
        low, high = 0.0, 1.0
        held: _Outcome | None = None
        going, is_retried = recipes, False
        # Relative to `high`, not to 1: a small ratio is found as exactly as a large one.
        while high - low > high / _PRECISION:
            middle = (low + high) / 2
            if not is_retried and high - low <= high / _RETRIED:
                going, is_retried = recipes, True
            try:
                outcome = self._best(going, middle, target)
            except BudgetError as error:
                if len(going) < len(recipes):
                    going = recipes  # Another recipe may reach this ratio.
                else:
                    low = max(middle, min(error.smallest_ratio or 0.0, high))
                continue
            except ValidationError:
                low = middle
                continue
            going = [recipe for recipe in going if recipe.name == outcome.trial.recipe]
            loser: _Outcome | None = outcome
            if target.holds(outcome.trial):
                held, loser, high = outcome, held, middle
            else:
                low = middle
            if loser is not None:
                loser.built.resources.close()
        return held

    @contextmanager
    def _deleted_on_error(self) -> Iterator[None]:
        """If the search fails, delete all models that it made."""
        try:
            yield
        except BaseException:
            for resources in self._made:
                resources.close()
            raise

    def _try(self, recipe: Recipe, ratio: float, plan: Plan | None = None) -> _Outcome | None:
        """The outcome of a recipe; None if an earlier recipe made the same model: a trial then says so."""
        progress = Labelled(self._progress, f"{recipe.name} at {ratio:.3g}")
        goal = Goal(ratio, recipe)
        plan = plan or settling.make(self._source, goal, self._scores, progress)
        if (twin := self._judged.get(_content(plan))) is not None:
            _log.debug("recipe %r at ratio %g: the model of recipe %r again", recipe.name, ratio, twin.recipe)
            self.trials.append(replace(twin, recipe=recipe.name, ratio=ratio))
            return None
        built = build(self._source, plan, self._calibration, self._executor, progress)
        self._made.append(built.resources)
        try:
            with progress.stage("compare"):
                outputs = judge(self._source.model, built, self._calibration)
        except ValidationError:
            built.resources.close()
            raise
        kept = caches(self._source.model.proto)
        trial = Trial(recipe.name, ratio, recipe.recover, outputs, caches=kept)
        _log.debug(
            "recipe %r at ratio %g%s: output error %s, agreement %s",
            recipe.name,
            ratio,
            ", recovered" * recipe.recover,
            words.error(trial.error),
            words.percent(trial.agreement),
        )
        self.trials.append(trial)
        self._judged[_content(plan)] = trial
        return _Outcome(built, trial)

    def _chosen(self, outcome: _Outcome) -> Built:
        index = next(n for n, trial in enumerate(self.trials) if trial is outcome.trial)
        self.trials[index] = replace(outcome.trial, chosen=True)
        _log.debug("took recipe %r at ratio %g", outcome.trial.recipe, outcome.trial.ratio)
        return outcome.built


def _better(one: _Outcome, other: _Outcome, target: Target) -> _Outcome:
    """The outcome of smaller loss; the other outcome's model is deleted."""
    # Not <=, or the first of equals does not stay.
    is_second = target.loss(other.trial) < target.loss(one.trial)
    worse, better = (one, other) if is_second else (other, one)
    worse.built.resources.close()
    return better


def _content(plan: Plan) -> Hashable:
    """The parts of a plan that determine its model."""
    options = tuple((choice.layer, choice.option) for choice in plan.choices)
    return options, plan.factors, plan.recover, plan.merge


def _reach(error: BudgetError | ValidationError) -> float:
    """The smallest ratio that an error names; infinity if it names none."""
    smallest = error.smallest_ratio if isinstance(error, BudgetError) else None
    return inf if smallest is None else smallest
