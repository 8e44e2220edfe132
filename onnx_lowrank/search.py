"""Which recipe, and which ratio: compressed models are made and judged on held-out calibration inputs.

Which rule is best differs by model and by ratio, and held-out inputs show it, without labels. The models
that lose are deleted as soon as that is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from math import inf

from onnx_lowrank import planner
from onnx_lowrank.build import Built, build, judge
from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.errors import BudgetError, ValidationError
from onnx_lowrank.found import Found
from onnx_lowrank.linalg.backend import Backend
from onnx_lowrank.planner import Goal
from onnx_lowrank.recipe import Recipe
from onnx_lowrank.recovery import can_recover
from onnx_lowrank.report.progress import Progress
from onnx_lowrank.scoring import Scores
from onnx_lowrank.types import Budget, Trial

AUTO = ("output", "activation", "schatten")
"""The recipes that `auto` tries; `passes/README.md` says why these."""

_STEPS = 7
"""Bisections of the ratio: to within 1/128."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the outputs of the compressed model have to hold on held-out calibration inputs.

    Attributes:
        error: The largest relative error of any output; None for any.
        agreement: The least agreement of any output that has one; None for any.
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
        budget: Budget,
        scores: Scores,
        calibration: Calibration,
        backend: Backend,
        progress: Progress,
    ) -> None:
        self.trials: list[Trial] = []
        self._made: list[ExitStack] = []
        self._found = found
        self._budget = budget
        self._scores = scores
        self._calibration = calibration
        self._backend = backend
        self._progress = progress

    def best(self, recipes: Sequence[Recipe], ratio: float) -> Built:
        """The model of least held-out error over several recipes, of which the best is recovered, too.

        Recovery is judged layer by layer, so that only the whole model shows whether it has paid.

        Raises:
            BudgetError: None of them reaches the ratio.
            ValidationError: All that do give NaN or Inf.
        """
        with self._deleted_on_error():
            return self._chosen(self._best(recipes, ratio))

    def _best(self, recipes: Sequence[Recipe], ratio: float) -> _Outcome:
        """As `best`: all recipes without recovery, which is quick, then the best that has one with it."""
        best: _Outcome | None = None
        errors: list[BudgetError | ValidationError] = []
        found: list[tuple[tuple[float, float], Recipe]] = []
        for recipe in recipes:
            outcome = self._tried(replace(recipe, recover=False), ratio, errors)
            if outcome is not None:
                best = outcome if best is None else _better(best, outcome)
                found.append((_loss(outcome.trial), recipe))
        recovering = [pair for pair in found if pair[1].recover]
        if recovering and self._recovers():
            outcome = self._tried(min(recovering, key=lambda pair: pair[0])[1], ratio, errors)
            if outcome is not None:
                best = outcome if best is None else _better(best, outcome)
        if best is None:
            raise min(errors, key=_reach)
        return best

    def _recovers(self) -> bool:
        """Whether there is a layer to recover; else recovery would make the same model once more."""
        return any(can_recover(self._found, b, self._calibration) for b in self._found.bindings)

    def _tried(
        self, recipe: Recipe, ratio: float, errors: list[BudgetError | ValidationError]
    ) -> _Outcome | None:
        """What a recipe makes, or None: then the trial says why, and the error is among the others."""
        try:
            return self._try(recipe, ratio)
        except (BudgetError, ValidationError) as error:
            self.trials.append(Trial(recipe.name, ratio, recipe.recover, note=str(error)))
            errors.append(error)
            return None

    def smallest(self, recipes: Sequence[Recipe], target: Target) -> Built:
        """The model of the smallest ratio that holds a target, by bisection.

        The recipe that is best at ratio ½ makes all of them.

        Raises:
            ValidationError: No model holds it, not even that of ratio 1.
        """
        with self._deleted_on_error():
            held = self._bisected(recipes, target)
            if held is None:
                held = self._best(recipes, 1.0)
                if not target.holds(held.trial):
                    raise ValidationError(
                        "The target cannot be judged, because no output of the model has what it asks for: "
                        "see the comparison that --ratio 1 gives, and choose the other target."
                    )
            return self._chosen(held)

    def _bisected(self, recipes: Sequence[Recipe], target: Target) -> _Outcome | None:
        """The model of the smallest ratio below 1 that holds a target, or None."""
        low, high = 0.0, 1.0
        held: _Outcome | None = None
        for _ in range(_STEPS):
            middle = (low + high) / 2
            try:
                outcome = self._best(recipes, middle)
            except (BudgetError, ValidationError):
                low = middle
                continue
            recipes = [recipe for recipe in recipes if recipe.name == outcome.trial.recipe]
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

    def _try(self, recipe: Recipe, ratio: float) -> _Outcome:
        plan = planner.make(self._found, Goal(ratio, recipe, self._budget), self._scores, self._progress)
        built = build(self._found, plan, self._calibration, self._backend, self._progress)
        self._made.append(built.resources)
        try:
            with self._progress.stage("compare"):
                outputs = judge(self._found, built, self._calibration)
        except ValidationError:
            built.resources.close()
            raise
        trial = Trial(recipe.name, ratio, recipe.recover, outputs)
        self.trials.append(trial)
        return _Outcome(built, trial)

    def _chosen(self, outcome: _Outcome) -> Built:
        index = next(n for n, trial in enumerate(self.trials) if trial is outcome.trial)
        self.trials[index] = replace(outcome.trial, chosen=True)
        return outcome.built


def _better(one: _Outcome, other: _Outcome) -> _Outcome:
    """The outcome of less error, the first of equals; the other's model is deleted."""
    worse, better = (one, other) if _loss(other.trial) < _loss(one.trial) else (other, one)
    worse.built.resources.close()
    return better


def _reach(error: BudgetError | ValidationError) -> float:
    """The smallest ratio that an error knows of."""
    smallest = error.smallest_ratio if isinstance(error, BudgetError) else None
    return inf if smallest is None else smallest


def _loss(trial: Trial) -> tuple[float, float]:
    """What is better is less: the error, and the disagreement where errors are equal or unknown."""
    return inf if trial.error is None else trial.error, -(trial.agreement or 0.0)
