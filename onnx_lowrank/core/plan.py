"""A plan: one choice for every layer, and how it was made."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Option


class Aggregate(StrEnum):
    """How the errors of all layers are combined into the number that a plan minimizes.

    UNIFORM and RATIO are rules that minimize nothing: one relative rank for all layers, one ratio of costs.
    """

    MAX = "max"
    SUM = "sum"
    UNIFORM = "uniform"
    RATIO = "ratio"


@dataclass(frozen=True, slots=True)
class Choice:
    """The plan's choice for one layer.

    Attributes:
        layer: The layer's id.
        option: The decomposition, or None to keep the layer.
        cost: Cost of the layer in the plan's budget.
        error: Error of the layer in the recipe's measure.
        reason: Why the layer is kept; "" if it is rewritten.
    """

    layer: str
    option: Option | None
    cost: int
    error: float
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Solver:
    """The quality of a plan.

    Attributes:
        aggregate: How the layers' errors are combined into the objective.
        power: The exponent of each error in a sum.
        objective: Value of the number that the recipe minimizes.
        gap: Proven bound on (objective − optimum) / objective; 0 is optimal. None if the recipe follows a
            rule and minimizes no objective.
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
        measure: Name of the measure in which the errors are given.
        ratio: The ratio asked for.
        budget: Name of the budget that the ratio bounds.
        choices: One per layer, in graph order.
        solver: Its quality; None if that is unknown, as for an edited plan.
        digest: SHA-256 of all other fields, computed when the plan was made. It no longer matches an edited
            plan, and proofs about the original are then not reported.
        factors: The target of the fit of its factors.
        recover: Whether each layer is fitted to correct the errors of the compressed layers before it.
        merge: Whether adjacent linear operators are multiplied if their product is smaller.
        then: Name of the kind of quantization that follows; "" if none does.
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
    then: str = ""
