"""Which recipe, and which ratio: compressed models are made and judged on held-out calibration inputs.

Which rule is best differs by model and by ratio, and held-out inputs show it, without labels. The models
that lose are deleted as soon as that is known.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.core.outcome import Trial
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.documents.recipes import Recipe
from onnx_lowrank.engines.compare import compare
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.errors import BudgetError, InputError, ValidationError
from onnx_lowrank.layers.found import Found
from onnx_lowrank.progress import Labelled, Progress
from onnx_lowrank.report import words
from onnx_lowrank.stages import settle as settling
from onnx_lowrank.stages.build import Built, build, judge
from onnx_lowrank.stages.plan import Goal
from onnx_lowrank.stages.recover import can_recover
from onnx_lowrank.stages.score import Scores
from onnx_lowrank.work.executor import Executor

_log = logging.getLogger(__name__)

AUTO = ("output", "activation", "schatten")
"""The recipes that `auto` tries; `passes/README.md` says why these."""

_PRECISION = 128
"""The ratio that a search finds is at most 1/128 of itself above one that does not hold."""

_RETRIED = 8
"""All recipes are tried again once the ratio is known to 1/8 of itself: the best may be another there."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the outputs of the compressed model have to hold on held-out calibration inputs.

    Attributes:
        error: The largest error of any output, centred where that tells; None for any.
        agreement: The least agreement of any output that has one, of nearest neighbours for an embedding;
            None for any.
    """

    error: float | None = None
    agreement: float | None = None

    def holds(self, trial: Trial) -> bool:
        """Whether a trial meets it; what was not measured does not."""
        if not trial.outputs:
            return False
        error = inf if trial.error is None else trial.error
        if self.error is not None and error > self.error:
            return False
        agreement = 0.0 if trial.agreement is None else trial.agreement
        return self.agreement is None or agreement >= self.agreement

    def loss(self, trial: Trial) -> tuple[float, ...]:
        """What is better is less: what holds first, then by what the target asks for, by error if by neither.

        Where errors are equal or unknown agreement decides, and the other way round.
        """
        error, disagreement = inf if trial.error is None else trial.error, -(trial.agreement or 0.0)
        by_error = self.error is not None or self.agreement is None
        order = (error, disagreement) if by_error else (disagreement, error)
        return (0.0 if self.holds(trial) else 1.0, *order)


_CHOICE = 3
"""The fewest rows of which each has a nearest neighbour and another row."""


def check_target(target: Target, model: str, outputs: Mapping[str, Any], feed: Feed, samples: int) -> None:
    """Find out whether a model has outputs that a target can be judged by.

    Args:
        target: The target.
        model: What the input model is called.
        outputs: Its outputs.
        feed: The inputs that gave them, one sample.
        samples: On how many samples the target is judged.

    Raises:
        InputError: It has none.
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
        trials: All that was tried, in order.
    """

    def __init__(
        self,
        found: Found,
        scores: Scores,
        calibration: Calibration,
        executor: Executor,
        progress: Progress,
    ) -> None:
        self.trials: list[Trial] = []
        self._made: list[ExitStack] = []
        self._found = found
        self._scores = scores
        self._calibration = calibration
        self._executor = executor
        self._progress = progress

    def best(self, recipes: Sequence[Recipe], ratio: float) -> Built:
        """The model of least held-out error over several recipes, of which the best is recovered, too.

        Recovery is judged layer by layer, so that only the whole model shows whether it has paid.

        Raises:
            BudgetError: None of them reaches the ratio.
            ValidationError: All that do give NaN or Inf.
        """
        with self._deleted_on_error():
            return self._chosen(self._best(recipes, ratio, Target()))

    def _best(self, recipes: Sequence[Recipe], ratio: float, target: Target) -> _Outcome:
        """As `best`, for a target: all without recovery, which is quick, then the best of them with it."""
        best: _Outcome | None = None
        errors: list[BudgetError | ValidationError] = []
        found: list[tuple[tuple[float, ...], Recipe, Plan]] = []
        for recipe in recipes:
            outcome = self._tried(replace(recipe, recover=False), ratio, errors)
            if outcome is not None:
                best = outcome if best is None else _better(best, outcome, target)
                found.append((target.loss(outcome.trial), recipe, outcome.built.plan))
        recovering = [of for of in found if of[1].recover]
        if recovering and self._recovers():
            _, recipe, plan = min(recovering, key=lambda of: of[0])
            # Measured times would make another plan each time.
            plan = plans.sealed(replace(plan, recover=True))
            outcome = self._tried(recipe, ratio, errors, plan)
            if outcome is not None:
                best = outcome if best is None else _better(best, outcome, target)
        if best is None:
            raise min(errors, key=_reach)
        return best

    def _recovers(self) -> bool:
        """Whether there is a layer to recover; else recovery would make the same model once more."""
        found, statistics = self._found, self._calibration.statistics
        return any(can_recover(found.model, found.walk, b, statistics) for b in found.bindings)

    def _tried(
        self,
        recipe: Recipe,
        ratio: float,
        errors: list[BudgetError | ValidationError],
        plan: Plan | None = None,
    ) -> _Outcome | None:
        """What a recipe makes, or None: then the trial says why, and the error is among the others."""
        try:
            return self._try(recipe, ratio, plan)
        except (BudgetError, ValidationError) as error:
            self.trials.append(Trial(recipe.name, ratio, recipe.recover, note=str(error)))
            errors.append(error)
            return None

    def smallest(self, recipes: Sequence[Recipe], target: Target) -> Built:
        """The model of the smallest ratio that holds a target, by bisection: of those that it tries.

        Errors need not fall steadily with the ratio, so that a smaller one may hold it, too. The recipe that
        is best at ratio ½ makes them, until all are tried again close to the end.

        Raises:
            ValidationError: No model holds it, not even that of ratio 1.
        """
        with self._deleted_on_error():
            held = self._bisected(recipes, target) or self._best(recipes, 1.0, target)
            if not target.holds(held.trial):
                raise ValidationError(
                    "Not even the model of ratio 1 holds the target: it gives other outputs each time that "
                    "it runs. Choose the other target, or a ratio."
                )
            return self._chosen(held)

    def _bisected(self, recipes: Sequence[Recipe], target: Target) -> _Outcome | None:
        """The model of the smallest ratio below 1 that holds a target, or None."""
        low, high = 0.0, 1.0
        held: _Outcome | None = None
        going, is_retried = recipes, False
        while high - low > high / _PRECISION:
            middle = (low + high) / 2
            if not is_retried and high - low <= high / _RETRIED:
                going, is_retried = recipes, True
            try:
                outcome = self._best(going, middle, target)
            except BudgetError as error:
                if len(going) < len(recipes):
                    going = recipes  # another may reach it
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
        """Delete all models that were made if the search fails."""
        try:
            yield
        except BaseException:
            for resources in self._made:
                resources.close()
            raise

    def _try(self, recipe: Recipe, ratio: float, plan: Plan | None = None) -> _Outcome:
        progress = Labelled(self._progress, f"{recipe.name} at {ratio:.3g}")
        goal = Goal(ratio, recipe)
        plan = plan or settling.make(self._found, goal, self._scores, progress)
        built = build(self._found, plan, self._calibration, self._executor, progress)
        self._made.append(built.resources)
        try:
            with progress.stage("compare"):
                outputs = judge(self._found, built, self._calibration)
        except ValidationError:
            built.resources.close()
            raise
        trial = Trial(recipe.name, ratio, recipe.recover, outputs)
        _log.debug(
            "recipe %r at ratio %g%s: output error %s, agreement %s",
            recipe.name,
            ratio,
            ", recovered" * recipe.recover,
            words.error(trial.error),
            words.percent(trial.agreement),
        )
        self.trials.append(trial)
        return _Outcome(built, trial)

    def _chosen(self, outcome: _Outcome) -> Built:
        index = next(n for n, trial in enumerate(self.trials) if trial is outcome.trial)
        self.trials[index] = replace(outcome.trial, chosen=True)
        _log.debug("took recipe %r at ratio %g", outcome.trial.recipe, outcome.trial.ratio)
        return outcome.built


def _better(one: _Outcome, other: _Outcome, target: Target) -> _Outcome:
    """The outcome of less loss, the first of equals; the other's model is deleted."""
    is_second = target.loss(other.trial) < target.loss(one.trial)
    worse, better = (one, other) if is_second else (other, one)
    worse.built.resources.close()
    return better


def _reach(error: BudgetError | ValidationError) -> float:
    """The smallest ratio that an error knows of."""
    smallest = error.smallest_ratio if isinstance(error, BudgetError) else None
    return inf if smallest is None else smallest
