"""The quality of a plan in words."""

from __future__ import annotations

from onnx_lowrank.core.plan import Aggregate, Solver
from onnx_lowrank.report import words

_RULES = {
    Aggregate.UNIFORM: "one relative rank for all layers",
    Aggregate.RATIO: "the largest ratios of the layers that fit",
}


def sentence(solver: Solver, measure: str) -> str:
    """The number that a plan minimizes, and the proof that it is the least.

    Args:
        solver: The quality of the plan.
        measure: Name of the measure of an option's error.
    """
    if solver.gap is None:
        proof = _RULES.get(solver.aggregate, "the smallest lambda that fits")
    else:
        proof = "proven optimal" if solver.gap <= 0 else f"within {solver.gap:.2g} of the optimum"
    return f"Objective ({_objective(solver, measure)}): {proof}."


def _objective(solver: Solver, measure: str) -> str:
    value = words.number(solver.objective)
    if solver.aggregate is not Aggregate.SUM:
        return f"largest {measure} error {value}"
    power = "" if solver.power == 1 else f" to the power {solver.power:g}"
    return f"sum of {measure} errors{power} {value}"
