"""A plan: one choice for every layer, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Option


class Aggregate(StrEnum):
    """How the errors of all layers become the number that a plan minimizes."""

    MAX = "max"
    SUM = "sum"
    UNIFORM = "uniform"


@dataclass(frozen=True, slots=True)
class Choice:
    """What the plan does with one layer.

    Attributes:
        layer: The layer's id.
        option: The decomposition, or None to keep the layer.
        cost: Cost of the layer in the plan's budget.
        error: Its error in the recipe's measure.
        reason: Why the layer is kept; "" where it is not.
    """

    layer: str
    option: Option | None
    cost: int
    error: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Solver:
    """How good a plan is.

    Attributes:
        aggregate: How the layers' errors became the objective.
        power: The exponent of an error in a sum.
        objective: What the recipe minimizes.
        gap: Proven bound on how far the objective is above the best possible, relative to it; 0 is optimal.
            None where the recipe follows a rule and minimizes no objective.
    """

    aggregate: Aggregate
    power: float
    objective: float
    gap: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """One choice for every layer.

    Attributes:
        model: SHA-256 of the input model.
        recipe: Name of the recipe that made it.
        measure: Name of the measure of the errors.
        ratio: The ratio asked for.
        budget: Name of the budget: what the ratio counts.
        choices: One per layer, in graph order.
        solver: How good it is; None where that is unknown, as of an edited plan.
        digest: SHA-256 of all the rest, from when it was made. An edited plan does not have its digest,
            and what was proven of the original is not said of it.
        factors: What its factors are fitted to.
        recover: Whether they are fitted to what the compressed layers before them give.
        merge: Whether adjacent linear operators are multiplied where that makes them smaller.
    """

    model: str
    recipe: str
    measure: str
    ratio: float
    budget: str
    choices: tuple[Choice, ...]
    solver: Solver | None = None
    digest: str = ""
    factors: Fit = Fit.WEIGHTS
    recover: bool = False
    merge: bool = True
