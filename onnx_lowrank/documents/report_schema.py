"""The JSON report: its keys in order, and the meaning of each key.

`as_json` writes these tables and `documents.reports` reads them. Unknown, infinite and NaN values are null.
"""

from __future__ import annotations

from onnx_lowrank.core.factors import Fit as Fitted
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents.report_details import Alternative, Curve, Graph, Total
from onnx_lowrank.documents.report_outputs import Distilled as Distilled
from onnx_lowrank.documents.report_outputs import Output as Output
from onnx_lowrank.documents.report_outputs import Quantized as Quantized
from onnx_lowrank.documents.report_outputs import Table
from onnx_lowrank.documents.report_outputs import Undecomposed as Undecomposed

VERSION = 1
"""Increased when a key is removed or changes its meaning. New keys have a default and do not increase it."""


class Model(Table, frozen=True):
    """The input model.

    Attributes:
        name: Its file's name without folder and suffix.
        sha256: Its digest.
    """

    name: str
    sha256: str


class Recipe(Table, frozen=True):
    """The recipe that chose the options.

    Attributes:
        name: Name of the recipe.
        measure: Name of the measure of an option's error.
    """

    name: str
    measure: str


class Ratio(Table, frozen=True):
    """The ratio asked for and the ratio reached.

    Attributes:
        budget: Name of the budget that the ratio bounds.
        asked: The ratio asked for.
        reached: The ratio of the compressed model.
    """

    budget: str
    asked: float
    reached: float


class Solver(Table, frozen=True):
    """The quality of the plan.

    Attributes:
        aggregate: How the layers' errors are combined into the objective.
        power: The exponent of each error in a sum.
        objective: Value of the number that the recipe minimizes.
        gap: Proven bound on (objective − optimum) / objective; null for recipes that follow a rule: those
            with the aggregates uniform and ratio, or with a price.
    """

    aggregate: Aggregate
    power: float
    objective: float | None
    gap: float | None


class Certificate(Table, frozen=True):
    """Bounds on the norms of the residual relative to the norms of the weight, one per operator group.

    Attributes:
        spectral: Bounds on spectral norms.
        frobenius: Bounds on Frobenius norms.
    """

    spectral: tuple[float | None, ...]
    frobenius: tuple[float | None, ...]


class Fit(Table, frozen=True):
    """How the factors of a layer were made.

    Attributes:
        factors: The target of the fit.
        recovered: Whether they were fitted to correct the errors of the compressed layers before this one.
        error: Relative squared error of the layer's output on calibration inputs.
    """

    factors: Fitted
    recovered: bool
    error: float | None


class Layer(Table, frozen=True):
    """One layer; fold, k, j, lowering, full_rank and error are null if it is kept.

    Certificate and fit are null, too, unless recovery gave the weight of the kept layer new numbers.

    Attributes:
        id: Scope path and weight name.
        name: The name in the table.
        op: Operator type.
        shape: Groups, outputs per group, inputs per group, kernel.
        dtype: Name of the stored dtype.
        nodes: Names of the nodes that apply it.
        fold: The unfolding of its weight to a matrix.
        k: Number of slices.
        j: Rank of every slice.
        lowering: The operators of its chain.
        full_rank: The rank at which every slice would be exact.
        params: Its parameters.
        macs: Its multiply-accumulates.
        error: Its error in the recipe's measure.
        certificate: Bounds on the residual of the stored factors.
        reason: Why it is kept; "" if it is rewritten.
        fit: How its new numbers were made.
        kept_rows: The number of rows of a table that stay as they are.
        joined: Ids of all layers that share a factor with it, itself included; empty if there is no other.
        cost: Its cost in the budget's unit, as the plan counts it.
        curve: Its error by rank; null if no decomposition was considered, and for a replayed plan.
        alternatives: Some decompositions that the plan has chosen from, the cheapest first.
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
    kept_rows: int = 0
    joined: tuple[str, ...] = ()
    cost: Total | None = None
    curve: Curve | None = None
    alternatives: tuple[Alternative, ...] = ()


class Skipped(Table, frozen=True):
    """An operator that was left alone.

    Attributes:
        scope: Path of its graph or function.
        name: Its name.
        op: Its operator type.
        weight: Name of its weight.
        reason: Why it was left alone, and what the user can do.
    """

    scope: str
    name: str
    op: str
    weight: str
    reason: str


class Merge(Table, frozen=True):
    """Two nodes that became one. The entries of the layers describe their state before this step.

    Attributes:
        first: Name of the node that was removed.
        second: Name of the node that computes both.
        layers: The layers whose chains contained one of the nodes.
        elements: Number of elements of the first weight, of the second weight, and of their product.
        saved: Number of parameters saved.
        certificate: Bounds on the error of the stored product, relative to the exact product; null if the
            product was trained afterwards.
    """

    first: str
    second: str
    layers: tuple[str, ...]
    elements: tuple[int, ...]
    saved: int
    certificate: Certificate | None


class Other(Table, frozen=True):
    """The comparison of both models on inputs of another kind (--check).

    Attributes:
        source: The source of the inputs.
        outputs: One error per output on these inputs.
        familiar: The errors of the same outputs on the inputs to compare with; empty without such inputs.
        kind: These inputs: "held-out" or "calibration" inputs, or "inputs" of --inputs; "" without any.
    """

    source: str
    outputs: tuple[Output, ...]
    familiar: tuple[Output, ...]
    kind: str


class Continuation(Table, frozen=True):
    """The agreement of texts that both models write: greedy continuations of prompts, each with its cache.

    Attributes:
        prompts: Number of prompts, the first halves of held-out samples or of --inputs.
        tokens: Number of tokens that each model wrote.
        agreement: The share of them that are the same at the same place.
    """

    prompts: int
    tokens: int
    agreement: float


class Validation(Table, frozen=True):
    """The comparison of both models.

    Attributes:
        engine: The engine that ran them.
        inputs: The source of the inputs.
        worst: The largest relative error over the outputs; null if no error could be measured.
        outputs: One error per output.
        never_ran: Ids of the rewritten layers that never ran; null if that is unknown.
        notes: Sentences for the user.
        alone: One error per rewritten layer, run alone, if no engine could run the model.
        other: The comparison on inputs of another kind; null without --check.
        continuation: The agreement of greedy continuations; null for models without a cache or texts.
        fused: The numbers of the operators that ONNX Runtime's optimizer puts in place of several, by type;
            null if they were not counted.
        quantized: The quantization whose model this is about; null without --then.
        distilled: The distillation before that; null without --distil.
    """

    engine: str
    inputs: str
    worst: float | None
    outputs: tuple[Output, ...]
    never_ran: tuple[str, ...] | None
    notes: tuple[str, ...]
    alone: tuple[Output, ...]
    other: Other | None = None
    continuation: Continuation | None = None
    fused: dict[str, Total] | None = None
    quantized: Quantized | None = None
    distilled: Distilled | None = None


class Target(Table, frozen=True):
    """The target that replaced a ratio; one of its bounds can be null.

    Attributes:
        error: The largest allowed output error.
        agreement: The smallest allowed agreement.
    """

    error: float | None
    agreement: float | None


class Unmeasured(Table, frozen=True):
    """A layer that the calibration inputs did not measure.

    Attributes:
        layer: Its id.
        reason: Why they did not.
    """

    layer: str
    reason: str


class Calibration(Table, frozen=True):
    """The calibration inputs and their use.

    Attributes:
        source: Their source.
        samples: Number of samples that were used.
        held: Number of these samples that were held out.
        unmeasured: The layers that they did not measure.
    """

    source: str
    samples: int
    held: int
    unmeasured: tuple[Unmeasured, ...]


class LayerTime(Table, frozen=True):
    """How long a rewritten layer takes, in nanoseconds.

    Attributes:
        layer: Its id.
        before: Time of the original layer, alone.
        predicted: Predicted time of its chain inside the model; null for a replayed plan.
        after: Time of its chain, alone.
    """

    layer: str
    before: int
    predicted: int | None
    after: int


class CallTime(Table, frozen=True):
    """How long the whole model takes on one of several sets of shapes, in nanoseconds of one run.

    Attributes:
        inputs: The source of the inputs.
        weight: The share of such calls among all.
        before: Time of the input model.
        after: Time of the compressed model; null in a dry run.
    """

    inputs: str
    weight: float
    before: int
    after: int | None


class Timing(Table, frozen=True):
    """How long the whole model takes, in nanoseconds of one run.

    Attributes:
        engine: The engine that ran it.
        inputs: The source of the inputs.
        before: Time of the input model.
        predicted: Planned time of the compressed model; null for a replayed plan.
        after: Time of the compressed model; null in a dry run.
        spread: Longest over shortest median of the input model's time.
        layers: Times of the rewritten layers.
        calls: Times on every set of shapes, whose means by weight the others are; empty for one set.
    """

    engine: str
    inputs: str
    before: int
    predicted: int | None
    after: int | None
    spread: float
    layers: tuple[LayerTime, ...]
    calls: tuple[CallTime, ...] = ()


class Trial(Table, frozen=True):
    """A plan that was tried.

    Attributes:
        recipe: Name of the recipe.
        ratio: The ratio that was asked for.
        recovered: Whether its layers were fitted to correct the errors of the layers before them.
        error: The largest output error.
        agreement: The smallest agreement of an output; the share of kept neighbours for rows of norm 1.
        chosen: Whether its model is the result.
        note: Why there are no outputs.
        outputs: Errors of the outputs on the held-out calibration inputs.
        caches: The outputs that a decoder keeps for its next call, which judge no plan.
    """

    recipe: str
    ratio: float
    recovered: bool
    error: float | None
    agreement: float | None
    chosen: bool
    note: str
    outputs: tuple[Output, ...]
    caches: tuple[str, ...] = ()


class Report(Table, frozen=True):
    """The whole report.

    Attributes:
        schema: The version of these keys.
        version: The version of this program.
        model: The input model.
        recipe: The recipe that chose the options.
        ratio: The ratio asked for and the ratio reached.
        solver: The quality of the plan; null for an edited plan.
        totals: Amounts of the whole model by name: params, macs, bytes, and time in nanoseconds; the time is
            null unless it was measured (budget latency, or --time).
        layers: All layers, in graph order.
        skipped: The operators that were left alone.
        removed_inputs: Names of graph inputs that were removed with their initializers.
        merges: The pairs of operators that were multiplied.
        validation: The comparison of both models; null if none was made.
        warnings: Sentences that warn the user.
        target: The target that replaced a ratio; null if a ratio was given.
        calibration: The calibration inputs and their use; null if there were none.
        timing: How long the model takes; null if nothing was timed.
        trials: The plans that were tried; empty if none were compared.
        graph: The differences of both graphs; null in a dry run.
        counted: The inputs for which MACs and times count, where neither the model nor the user states their
            shapes, a phrase; "" elsewhere.
        then: The kind of quantization of the compressed model, its name in --then; "" without one.
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
    graph: Graph | None = None
    counted: str = ""
    then: str = ""
