"""Plans that keep their promise: under a measured budget, every plan is measured in the whole model.

Rules:

1. A plan is made from the times of single layers. Its model, with random factors, is timed against the input
   model: the saving does not depend on the factors' numbers. If the model fails with random factors, the
   prediction counts. If adjacent operators can be multiplied, the model is timed with and without that: the
   product has fewer MACs, but its shape may suit the machine less.
2. If the saving differs from the prediction and some kinds of layers were not yet judged, each kind is
   measured alone in the model, and its saving there replaces the prediction. Layers that make the model
   slower are kept from then on.
3. While the ratio is missed, the next plan uses predictions that are corrected by the measured saving. A plan
   that comes again is measured again, and the median counts. Among the plans within the ratio, the one of
   least objective is taken, after a second measurement: the first may have been lucky.
4. If no plan is within the ratio, the fastest plan is tried, and some between it and those that are too slow.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import inf
from statistics import median

import numpy as np

from onnx_lowrank.budgets.budget import Gauge
from onnx_lowrank.core.option import Lowering, Option
from onnx_lowrank.core.plan import Plan
from onnx_lowrank.documents import plans
from onnx_lowrank.engines.engine import RejectedError, UnsupportedError
from onnx_lowrank.errors import BudgetError
from onnx_lowrank.graph.weights import dtype_of
from onnx_lowrank.layers.bias import bias
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.layers.found import Layered
from onnx_lowrank.probe.micro import placeholder
from onnx_lowrank.progress import Progress
from onnx_lowrank.rewrite.replace import Replacement
from onnx_lowrank.stages import planning
from onnx_lowrank.stages.build import assemble
from onnx_lowrank.stages.planning import Goal
from onnx_lowrank.stages.score import Scores

_log = logging.getLogger(__name__)

_ROUNDS = 5
_REPEATS = 3
_STEPS = 4
_NOTHING = 1e-9  # A ratio that no plan reaches.

_NOISE = 0.005
"""Approximate error of a measured ratio."""

_UNUSED = 0.02
"""The largest distance of a plan below the ratio; a smaller plan loses accuracy for nothing."""

_CHANGES = (0.6, 1.3)
"""The share of the predicted saving that is credible once every kind of layer was measured alone: other
shares mostly come from other work on the machine."""

_MISSED = 0.03
"""A prediction with a larger error is corrected kind by kind."""


def make(source: Layered, goal: Goal, scores: Scores, progress: Progress) -> Plan:
    """Make the best plan for a goal; under a measured budget, the best plan that was measured.

    Args:
        source: The model with its layers.
        goal: The purpose of the plan.
        scores: The errors of the options of its layers, and their costs.
        progress: Where to show progress.

    Raises:
        BudgetError: The ratio cannot be reached.
        InputError: The model cannot be counted.
    """
    gauge = scores.meter.gauge
    if gauge is None or goal.ratio == 1:
        return planning.make(source.model, goal, scores, progress)
    return _Settling(source, goal, scores, gauge, progress).run()


def options(plan: Plan) -> dict[str, Option]:
    """The options of the layers that a plan rewrites, by id."""
    return {choice.layer: choice.option for choice in plan.choices if choice.option is not None}


def _options(plan: Plan) -> tuple[Option | None, ...]:
    """The key of a plan among all plans for the same layers."""
    return tuple(choice.option for choice in plan.choices)


@dataclass(slots=True)
class _Settling:
    """The search for one plan.

    Attributes:
        tried: The measured plans with their ratios, by their options.
        judged: The kinds of layers that were measured alone.
    """

    source: Layered
    goal: Goal
    scores: Scores
    meter: Gauge
    progress: Progress
    tried: dict[tuple[Option | None, ...], tuple[Plan, list[float]]] = field(default_factory=dict)
    judged: set[str] = field(default_factory=set)

    def run(self) -> Plan:
        """Apply the rules in order."""
        self._learned()
        best = self._confirmed()
        if best is None:
            self._bisected()
            best = self._confirmed()
        if best is None:
            self.meter.keep()
            fastest = min((median(ratios) for _, ratios in self.tried.values()), default=1.0)
            raise BudgetError(
                f"The ratio {self.goal.ratio:g} of {self.meter.budget.name} cannot be reached for "
                f"{self.source.model.name} on {self.meter.place}: the fastest that was measured is "
                f"{fastest:.3f}, so raise the ratio or choose another --budget.",
                min(1.0, fastest),
            )
        reached = median(self.tried[_options(best)][1])
        _log.debug("measured %d plans and took the one at %.3f", len(self.tried), reached)
        return best

    def _confirmed(self) -> Plan | None:
        """The best plan; a plan that was measured once is measured again first (rule 3)."""
        best = self._best()
        while best is not None and len(self.tried[_options(best)][1]) == 1:
            self._measured(best)
            best = self._best()
        return best

    def _best(self) -> Plan | None:
        """The plan of least objective with a median ratio within the goal (rule 3)."""
        limit = self.goal.ratio + _NOISE
        held = [plan for plan, ratios in self.tried.values() if median(ratios) <= limit]
        # Plans without an objective come from rule 4: the last of these is the closest to the ratio.
        solved = [plan for plan in held if plan.solver is not None]
        last = held[-1] if held else None
        return min(solved, key=lambda plan: plan.solver.objective if plan.solver else inf, default=last)

    def _learned(self) -> None:
        """Make plans, each with the measured savings of those before it (rules 2 and 3)."""
        for turn in range(_ROUNDS):
            try:
                plan = self._plan(self.goal.ratio)
            except BudgetError as error:
                # Not in later turns: there corrected predictions may be wrong, and rule 4 goes on.
                if turn == 0 and (error.smallest_ratio is None or error.smallest_ratio >= 1):
                    raise
                return
            if len(self.tried.get(_options(plan), (plan, []))[1]) == _REPEATS:
                return
            reached = self._measured(plan)
            if -_NOISE <= self.goal.ratio - reached <= _UNUSED:
                return
            self._learn(options(plan), reached)

    def _bisected(self) -> None:
        """Search for a plan between the fastest and those that are too slow (rule 4)."""
        aim = low = self._smallest()
        high = max(low, self.goal.ratio)
        for _ in range(_STEPS):
            # Without the solver's proof, which is for the ratio `aim` and not for the one asked for.
            plan = replace(self._plan(aim), solver=None)
            if self._measured(plan) <= self.goal.ratio + _NOISE:
                low = aim
            else:
                high = aim
            if high <= low:  # The fastest plan is too slow, or the only one.
                return
            aim = (low + high) / 2

    def _smallest(self) -> float:
        """The least predicted ratio of any plan."""
        try:
            self._plan(_NOTHING)
        except BudgetError as error:
            return error.smallest_ratio or 1.0
        return _NOTHING

    def _plan(self, ratio: float) -> Plan:
        """The plan for a predicted ratio."""
        plan = planning.make(self.source.model, replace(self.goal, ratio=ratio), self.scores, self.progress)
        return replace(plan, ratio=self.goal.ratio)

    def _measured(self, plan: Plan) -> float:
        """Measure a plan; return the median of all ratios measured for it (rule 3)."""
        with self.progress.stage("time the plan"):
            ratio, merging = self._faster(options(plan))
        plan = plans.sealed(replace(plan, merge=merging))
        plan, ratios = self.tried.setdefault(_options(plan), (plan, []))
        ratios.append(ratio)
        reached = median(ratios)
        _log.debug(
            "a plan of %d layers takes %.3f of the time (median of %d); operators are multiplied: %s",
            len(options(plan)),
            reached,
            len(ratios),
            merging,
        )
        self.meter.remember(options(plan), reached)
        return reached

    def _learn(self, chosen: Mapping[str, Option], reached: float) -> None:
        """Correct the predicted savings of layers (rules 2 and 3)."""
        predicted = self.meter.predicted(chosen) / self.meter.total
        kinds = self.meter.kinds(chosen)
        if abs(predicted - reached) > _MISSED and not kinds <= self.judged:
            self.judged |= kinds
            _log.debug("predicted %.3f, measured %.3f: kinds of layers are judged alone", predicted, reached)
            with self.progress.stage("time kinds of layers", 1) as step:
                self.meter.correct(chosen, reached, lambda kind: self._faster(kind)[0], step)
        else:
            self.meter.learn(chosen, reached, _CHANGES)

    def _faster(self, chosen: Mapping[str, Option]) -> tuple[float, bool]:
        """The ratio of the model with the chosen layers rewritten, and whether operators are multiplied."""
        merged, number = self._ratio(chosen, merging=True)
        if not number:
            return merged, True
        apart, _ = self._ratio(chosen, merging=False)
        return (apart, False) if apart < merged - _NOISE else (merged, True)

    def _ratio(self, chosen: Mapping[str, Option], *, merging: bool) -> tuple[float, int]:
        """The ratio of the model with the chosen layers rewritten, and the number of merged pairs."""
        replacements = (
            self._placeholder(binding, chosen[binding.layer.id])
            for binding in self.source.bindings
            if binding.layer.id in chosen
        )
        rewritten, merges, resources = assemble(self.source, replacements, merging=merging)
        with resources:
            try:
                ratio = self.meter.ratio(rewritten.model)
            except (UnsupportedError, RejectedError):
                ratio = self.meter.predicted(chosen) / self.meter.total
        return ratio, len(merges)

    def _placeholder(self, binding: Binding, option: Option) -> Replacement:
        """A layer's replacement with random factors."""
        made = placeholder(binding, option, dtype_of(self.source.walk, binding.stored))
        if option.lowering is not Lowering.NARROW:
            return made
        # A narrow layer always gets a new bias, which can have fewer features.
        has_bias = bias(self.source.model, self.source.walk, binding) is not None
        return replace(made, bias=np.zeros(binding.layer.f)) if has_bias else made
