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
class Round:
    """Some steps of a training at one rate.

    Attributes:
        steps: Their number.
        rate: The rate, relative to the root mean square of each tensor.
        is_again: Whether they start from the best tensors so far.
    """

    steps: int
    rate: float
    is_again: bool = False


@dataclass(frozen=True, slots=True)
class Training:
    """A distillation, to be repeated to the same bits on one machine.

    Attributes:
        seed: The seed of all draws.
        torch: The version of PyTorch.
        device: The device that computed: "cpu" or "cuda".
        data: The digest of the inputs (`calibrate.passes.digest_of`).
        rounds: The rounds up to the best tensors.
    """

    seed: int
    torch: str
    device: str
    data: str
    rounds: tuple[Round, ...]


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
        training: The distillation of its model; None without one.
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
    training: Training | None = None
