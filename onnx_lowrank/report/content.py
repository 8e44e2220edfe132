"""The content of a report: all results of a run, as data without dates and paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from onnx_lowrank.core.factors import Certificate, LayerFit
from onnx_lowrank.core.layer import Skipped
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.outcome import Calibrated, Change, Merge, Timing, Trial, Validation
from onnx_lowrank.core.plan import Solver


@dataclass(frozen=True, slots=True)
class Total:
    """An amount in the input model and in the compressed model; None if it is unknown."""

    before: int | None
    after: int | None

    @property
    def ratio(self) -> float | None:
        """The share of the amount that is left; None if it is unknown or the amount was 0."""
        return self.after / self.before if self.before and self.after is not None else None


@dataclass(frozen=True, slots=True)
class Figure:
    """One amount of the whole model, not only of its layers.

    Attributes:
        key: Its key in the JSON report.
        total: The amount; None if the report does not show it.
        title: Title of its row in the terminal's totals; "" for no row.
        show: Writes the amount as text; None writes all digits.
        unknown: A sentence that the report shows if the amount is unknown; usually empty.
    """

    key: str
    total: Total | None
    title: str = ""
    show: Callable[[int | None], str] | None = None
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Totals:
    """Amounts of the whole model.

    Attributes:
        figures: The amounts, in the order in which they are shown.
    """

    figures: tuple[Figure, ...]

    def amount(self, key: str) -> Total:
        """The amount of a key; an unknown amount if the report does not show it."""
        known = (figure.total for figure in self.figures if figure.key == key and figure.total is not None)
        return next(known, Total(None, None))


@dataclass(frozen=True, slots=True)
class Curve:
    """How the error of a layer falls with the rank of one decomposition, at some of the ranks.

    Attributes:
        fold: Its fold.
        k: Its number of slices.
        ranks: Ranks of every slice, ascending.
        errors: The errors at these ranks in the recipe's measure.
        values: The largest singular value that each of these ranks leaves out; empty if the recipe needs no
            spectra.
    """

    fold: Fold
    k: int
    ranks: tuple[int, ...]
    errors: tuple[float, ...]
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Alternative:
    """A decomposition of a layer that no other one beats.

    Attributes:
        option: The decomposition.
        cost: Its cost in the budget's unit.
        error: Its error in the recipe's measure.
    """

    option: Option
    cost: int
    error: float


@dataclass(frozen=True, slots=True)
class Detail:
    """What a plan has chosen from for one layer.

    Attributes:
        curve: The errors by rank; None if no decomposition was considered.
        alternatives: Some of the decompositions, from the cheapest to the best.
    """

    curve: Curve | None = None
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class Graph:
    """How the graph of the compressed model differs from that of the input model.

    Attributes:
        operators: The numbers of nodes by operator type; only types whose number differs.
        changes: The places that differ, in order.
    """

    operators: Mapping[str, Total]
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer.

    Attributes:
        id: Its id.
        name: Its name for readers: the id, or its node's name if an exporter only numbered the weight.
        op: Its operator type.
        shape: The shape of the canonical weight: (groups, f / groups, c / groups, *kernel).
        dtype: Name of the stored dtype.
        nodes: Names of the nodes that apply it.
        option: The decomposition; None if the layer is kept.
        full_rank: The rank at which every slice would be exact; None if the layer is kept.
        params: Its parameters, including those of a folded BatchNorm and of added biases.
        macs: Its multiply-accumulates.
        error: Its error in the recipe's measure; None if the layer is kept.
        certificate: Bounds on the residual of the stored factors.
        reason: Why it is kept; "" if it is rewritten.
        kept: Number of rows of a table that stay as they are.
        fit: How its new numbers were made; None if that is unknown or it has none.
        joined: Ids of all layers that share a factor with it, itself included; empty if there is no other.
        cost: Its cost in the budget's unit, as the plan counts it.
        detail: What the plan has chosen from; empty for a replayed plan.
    """

    id: str
    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    nodes: tuple[str, ...]
    option: Option | None
    full_rank: int | None
    params: Total
    macs: Total
    error: float | None = None
    certificate: Certificate | None = None
    reason: str = ""
    fit: LayerFit | None = None
    kept: int = 0
    joined: tuple[str, ...] = ()
    cost: Total = Total(None, None)
    detail: Detail = Detail()


@dataclass(frozen=True, slots=True)
class Content:
    """All results of a run.

    Attributes:
        version: The version of this program.
        model: The input file's name without folder and suffix.
        sha256: Digest of the input model.
        recipe: Name of the recipe.
        measure: Name of the measure of an option's error.
        budget: Name of the budget that the ratio bounds.
        asked: The ratio asked for.
        reached: The ratio of the compressed model.
        solver: The quality of the plan; None for an edited plan.
        layers: All layers in graph order.
        skipped: The operators that were left alone.
        removed_inputs: Graph inputs that were removed with their initializers.
        totals: The amounts of the whole model.
        validation: The comparison of both models; None if none was made.
        warnings: Sentences that warn the user.
        calibration: The calibration inputs and their use; None if there were none.
        trials: The plans that were tried on calibration inputs.
        target_error: The largest allowed error of the held-out outputs; None if the user gave no such target.
        target_agreement: The smallest allowed agreement of these outputs; None if the user gave no such
            target.
        timing: How long both models take; None if nothing was timed.
        merges: The pairs of adjacent operators that were multiplied. The rows of the layers describe their
            state before this step.
        graph: The differences of both graphs; None in a dry run.
        counted: The inputs for which MACs and times count, where neither the model nor the user states their
            shapes, a phrase; "" elsewhere.
        then: The kind of quantization of the compressed model; "" without one.
    """

    version: str
    model: str
    sha256: str
    recipe: str
    measure: str
    budget: str
    asked: float
    reached: float
    solver: Solver | None
    layers: tuple[LayerRow, ...]
    skipped: tuple[Skipped, ...]
    removed_inputs: tuple[str, ...]
    totals: Totals
    validation: Validation | None = None
    warnings: tuple[str, ...] = ()
    calibration: Calibrated | None = None
    trials: tuple[Trial, ...] = ()
    target_error: float | None = None
    target_agreement: float | None = None
    timing: Timing | None = None
    merges: tuple[Merge, ...] = ()
    graph: Graph | None = None
    counted: str = ""
    then: str = ""
