"""The content of a report: everything that a run has to say, without dates and paths; data alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from onnx_lowrank.core.factors import Certificate, LayerFit
from onnx_lowrank.core.layer import Skipped
from onnx_lowrank.core.option import Option
from onnx_lowrank.core.outcome import Calibrated, Merge, Timing, Trial, Validation
from onnx_lowrank.core.plan import Solver


@dataclass(frozen=True, slots=True)
class Total:
    """An amount in the input model and in the compressed one; None where it is unknown."""

    before: int | None
    after: int | None

    @property
    def ratio(self) -> float | None:
        """The share that is left, 1 for all; None if it is unknown or the amount was 0."""
        return self.after / self.before if self.before and self.after is not None else None


@dataclass(frozen=True, slots=True)
class Figure:
    """One amount of the whole model, not only of its layers.

    Attributes:
        key: What it is called in the JSON report.
        total: The amount; None where the report has nothing to say of it.
        title: Its row in the terminal's totals; "" for none.
        show: Writes an amount; None for all digits.
        unknown: What to say where the amount is unknown, a sentence; mostly empty.
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
        figures: They, in the order in which they are shown.
    """

    figures: tuple[Figure, ...]

    def of(self, key: str) -> Total:
        """The amount of a key; unknown where the report has nothing to say of it."""
        known = (figure.total for figure in self.figures if figure.key == key and figure.total is not None)
        return next(known, Total(None, None))


@dataclass(frozen=True, slots=True)
class LayerRow:
    """One layer.

    Attributes:
        id: Its id.
        name: Its name for readers: the id, or its node's name where the weight's says nothing.
        op: Its operator type.
        shape: The shape of the canonical weight: (groups, f / groups, c / groups, *kernel).
        dtype: Name of the stored dtype.
        nodes: Names of the nodes that apply it.
        option: The decomposition; None where the layer is kept.
        full_rank: The rank at which it would be exact; None where the layer is kept.
        params: Its parameters, a BatchNorm that is folded in and added biases included.
        macs: Its multiply-accumulates.
        error: In the recipe's measure; None where the layer is kept.
        certificate: Norms of the residual, from the factors as stored.
        reason: Why it is kept; "" where it is not.
        fit: How its factors came about; None where that is unknown, or it is kept.
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


@dataclass(frozen=True, slots=True)
class Content:
    """Everything that a run has to say.

    Attributes:
        version: The version of this program.
        model: The input file's name without folder and suffix.
        sha256: Digest of the input model.
        recipe: Name of the recipe.
        measure: The error of an option.
        budget: Name of what the ratio counts.
        asked: The ratio asked for.
        reached: The ratio of the output.
        solver: How good the plan is; None where an edited plan was replayed.
        layers: All layers in graph order.
        skipped: What was left alone.
        removed_inputs: Graph inputs that went with their initializers.
        totals: The amounts of the whole model.
        validation: The comparison; None where none was made.
        warnings: What the user should know, a sentence each.
        calibration: What calibration inputs were used for; None where there were none.
        trials: The plans that were tried on calibration inputs.
        target_error: The error that the held-out outputs were to keep to, where that was asked for instead
            of a ratio.
        target_agreement: The agreement that they were to keep, likewise.
        timing: How long both models take; None where nothing was timed.
        merges: The adjacent operators that were multiplied: what the layers' rows say is of before.
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
