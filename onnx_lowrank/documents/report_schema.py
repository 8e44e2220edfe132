"""The JSON report: its keys, in their order, and what each holds.

`as_json` writes these tables and `documents.reports` reads them. A number that is unknown, infinite or not a
number is null.
"""

from __future__ import annotations

from msgspec import Struct

from onnx_lowrank.core.factors import Fit as Fitted
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.core.plan import Aggregate

VERSION = 1
"""It grows when a key changes its meaning or goes; new keys do not change it, and have a default."""


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object of the report."""


class Model(Table, frozen=True):
    """The input model.

    Attributes:
        name: Its file's name without folder and suffix.
        sha256: Its digest.
    """

    name: str
    sha256: str


class Recipe(Table, frozen=True):
    """What chose the options.

    Attributes:
        name: Name of the recipe.
        measure: Name of the error of an option.
    """

    name: str
    measure: str


class Ratio(Table, frozen=True):
    """What was to be reached.

    Attributes:
        budget: Name of what the ratio counts.
        asked: The ratio asked for.
        reached: The ratio of the output.
    """

    budget: str
    asked: float
    reached: float


class Solver(Table, frozen=True):
    """How good the plan is.

    Attributes:
        aggregate: How the layers' errors became the objective.
        power: The exponent of an error in a sum.
        objective: What the recipe minimizes.
        gap: Proven bound on how far the objective is above the best, relative to it; null under uniform and
            with a price, which follow a rule.
    """

    aggregate: Aggregate
    power: float
    objective: float | None
    gap: float | None


class Total(Table, frozen=True):
    """An amount in the input model and in the compressed one.

    Attributes:
        before: In the input model.
        after: In the compressed one.
        ratio: The share that is left, 1 for all.
    """

    before: int | None
    after: int | None
    ratio: float | None


class Certificate(Table, frozen=True):
    """Norms of the residual relative to the weight's, one number per operator group.

    Attributes:
        spectral: Spectral norms.
        frobenius: Frobenius norms.
    """

    spectral: tuple[float | None, ...]
    frobenius: tuple[float | None, ...]


class Fit(Table, frozen=True):
    """How the factors of a layer came about.

    Attributes:
        factors: What they were fitted to.
        recovered: Whether to what the compressed layers before it give.
        error: Squared, of the layer's outputs, relative.
    """

    factors: Fitted
    recovered: bool
    error: float | None


class Layer(Table, frozen=True):
    """One layer; fold, k, j, lowering, full_rank, error, certificate and fit are null where it is kept.

    Attributes:
        id: Scope path and weight name.
        name: The name as the table shows it.
        op: Operator type.
        shape: Groups, outputs per group, inputs per group, kernel.
        dtype: Name of the stored dtype.
        nodes: Names of the nodes that apply it.
        fold: How its weight was unfolded.
        k: Slices.
        j: Rank of every slice.
        lowering: By which operators its chain is written.
        full_rank: The rank at which it would be exact.
        params: Its parameters.
        macs: Its multiply-accumulates.
        error: In the recipe's measure.
        certificate: Norms of the residual, from the factors as stored.
        reason: Why it is kept; "" where it is not.
        fit: How its factors came about.
    """

    id: str
    name: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    nodes: tuple[str, ...]
    fold: Fold | None
    k: int | None
    j: int | None
    lowering: Lowering | None
    full_rank: int | None
    params: Total
    macs: Total
    error: float | None
    certificate: Certificate | None
    reason: str
    fit: Fit | None


class Skipped(Table, frozen=True):
    """An operator that was left alone.

    Attributes:
        scope: Path of its graph or function.
        name: Its name.
        op: Its operator type.
        weight: Name of its weight.
        reason: Why, and what to do about it.
    """

    scope: str
    name: str
    op: str
    weight: str
    reason: str


class Merge(Table, frozen=True):
    """Two nodes that became one; the layers are described as before that.

    Attributes:
        first: Name of the node that is gone.
        second: Name of the node that computes both.
        layers: The layers of whose chains they were.
        elements: The elements of both weights and of their product.
        saved: Parameters.
        certificate: What rounding has done to the product of the two weights.
    """

    first: str
    second: str
    layers: tuple[str, ...]
    elements: tuple[int, ...]
    saved: int
    certificate: Certificate


class Output(Table, frozen=True):
    """How far one output lies from the input model's.

    Attributes:
        name: The output; "layer ID" where layers ran alone.
        relative: ‖y − ŷ‖ / ‖y‖.
        largest: Largest |y − ŷ|.
        agreement: Share of rows with the same largest element, or of equal elements.
        note: What else there is to know.
        centred: ‖y − ŷ‖ / ‖y − ȳ‖, ȳ the mean over the samples.
        is_exact: Whether it holds integers, booleans or texts.
        cosine: For rows of norm 1, in place of agreement: the mean cosine to the original rows.
        neighbours: For rows of norm 1: the share that keep their nearest other row.
    """

    name: str
    relative: float | None
    largest: float | None
    agreement: float | None
    note: str
    centred: float | None
    is_exact: bool
    cosine: float | None
    neighbours: float | None


class Validation(Table, frozen=True):
    """What the comparison of both models gave.

    Attributes:
        engine: What ran them.
        inputs: Where the inputs came from.
        worst: The largest relative error over the outputs; null where none could be measured.
        outputs: One per output.
        never_ran: Ids of the rewritten layers which never ran; null where that is unknown.
        notes: What the user should know.
        alone: One per rewritten layer, where the model ran nowhere.
    """

    engine: str
    inputs: str
    worst: float | None
    outputs: tuple[Output, ...]
    never_ran: tuple[str, ...] | None
    notes: tuple[str, ...]
    alone: tuple[Output, ...]


class Target(Table, frozen=True):
    """What was asked for instead of a ratio; one can be null.

    Attributes:
        error: The largest error.
        agreement: The least agreement.
    """

    error: float | None
    agreement: float | None


class Unmeasured(Table, frozen=True):
    """A layer of which the calibration inputs tell nothing.

    Attributes:
        layer: Its id.
        reason: Why.
    """

    layer: str
    reason: str


class Calibration(Table, frozen=True):
    """What calibration inputs were used for.

    Attributes:
        source: Where they came from.
        samples: How many were used.
        held: How many of them were held out.
        unmeasured: The layers of which they tell nothing.
    """

    source: str
    samples: int
    held: int
    unmeasured: tuple[Unmeasured, ...]


class LayerTime(Table, frozen=True):
    """How long a rewritten layer takes, in nanoseconds.

    Attributes:
        layer: Its id.
        before: Alone, outside the model, as it was.
        predicted: Its chain, with what the layer saves in the model; null where a plan was replayed.
        after: Its chain, alone.
    """

    layer: str
    before: int
    predicted: int | None
    after: int


class Timing(Table, frozen=True):
    """How long the whole model takes, in nanoseconds of one run.

    Attributes:
        engine: What ran it.
        inputs: On which inputs.
        before: The input model.
        predicted: The compressed model, as planned; null where a plan was replayed.
        after: The compressed model; null in a dry run.
        spread: Longest over shortest median of the input model's time.
        layers: The rewritten layers.
    """

    engine: str
    inputs: str
    before: int
    predicted: int | None
    after: int | None
    spread: float
    layers: tuple[LayerTime, ...]


class Trial(Table, frozen=True):
    """A plan that was tried.

    Attributes:
        recipe: Name of the recipe.
        ratio: The ratio that was asked for.
        recovered: Whether its layers were recovered.
        error: The worst over the outputs.
        agreement: The worst over the outputs, of neighbours where rows have norm 1.
        chosen: Whether its model was taken.
        note: Why there are no outputs.
        outputs: As in the validation, on the held-out calibration inputs.
    """

    recipe: str
    ratio: float
    recovered: bool
    error: float | None
    agreement: float | None
    chosen: bool
    note: str
    outputs: tuple[Output, ...]


class Report(Table, frozen=True):
    """The whole report.

    Attributes:
        schema: The version of these keys.
        version: The version of this program.
        model: The input model.
        recipe: What chose the options.
        ratio: What was to be reached.
        solver: How good the plan is; null where an edited plan was replayed.
        totals: Amounts of the whole model by name: params, macs, bytes; time, in nanoseconds, is null where
            latency is not the budget.
        layers: All layers, in graph order.
        skipped: The operators that were left alone.
        removed_inputs: Names of graph inputs that went with their initializers.
        merges: The operators that were multiplied.
        validation: The comparison of both models; null where none was made.
        warnings: What the user should know, sentences.
        target: What was asked for instead of a ratio; null where a ratio was.
        calibration: What calibration inputs were used for; null where there were none.
        timing: How long the model takes; null where nothing was timed.
        trials: The plans that were tried; none where nothing was compared.
    """

    schema: int
    version: str
    model: Model
    recipe: Recipe
    ratio: Ratio
    solver: Solver | None
    totals: dict[str, Total | None]
    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    removed_inputs: tuple[str, ...]
    merges: tuple[Merge, ...]
    validation: Validation | None
    warnings: tuple[str, ...]
    target: Target | None
    calibration: Calibration | None
    timing: Timing | None
    trials: tuple[Trial, ...]
