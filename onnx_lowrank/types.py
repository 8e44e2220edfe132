"""The words of the project: what the stages hand each other, all frozen, none of it ONNX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = Any
"""An array of any namespace that array-api-compat knows (NumPy, CuPy)."""


class Fold(StrEnum):
    """How a weight tensor is unfolded into a matrix: which kernel axes stand on the encoder's side.

    The order of the members is the order in which ties are broken.
    """

    ENCODE = "encode"
    ROWS = "rows"
    COLS = "cols"
    DECODE = "decode"

    def encoder_axes(self, n: int) -> tuple[int, ...]:
        """The spatial axes (of `n`) whose kernel the encoder holds; the decoder holds the others.

        ROWS and COLS are defined for two spatial axes only.
        """
        match self:
            case Fold.ENCODE:
                return tuple(range(n))
            case Fold.ROWS:
                return (1,)
            case Fold.COLS:
                return (0,)
            case Fold.DECODE:
                return ()

    def kernels(self, kernel: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Split a kernel into the encoder's and the decoder's, each with every axis (1 where absent)."""
        axes = self.encoder_axes(len(kernel))
        encoder = tuple(n if axis in axes else 1 for axis, n in enumerate(kernel))
        decoder = tuple(1 if axis in axes else n for axis, n in enumerate(kernel))
        return encoder, decoder

    def on(self, kernel: tuple[int, ...]) -> Fold:
        """The first fold that splits a kernel as this one does.

        Folds coincide where axes have size 1 (matrices, 1×1 and 5×1 kernels); a kernel without
        exactly two axes has no rows and cols, there they stand for ENCODE.
        """
        if len(kernel) != 2 and self in (Fold.ROWS, Fold.COLS):
            return Fold.ENCODE
        candidates = tuple(Fold) if len(kernel) == 2 else (Fold.ENCODE, Fold.DECODE)
        return next(fold for fold in candidates if fold.kernels(kernel) == self.kernels(kernel))

    @classmethod
    def distinct(cls, kernel: tuple[int, ...]) -> tuple[Fold, ...]:
        """The folds of a kernel that differ from each other, in tie order."""
        return tuple(fold for fold in cls if fold.on(kernel) is fold)


class Measure(StrEnum):
    """The relative error of an option.

    SPECTRAL is max_i σ_{i,j+1} / σ_1(W), as the ALDS paper's code scores it; SPECTRAL_BOUND is √k
    times that, the bound of its Theorem 1 on ‖W − Ŵ‖₂ / ‖W‖₂. FROBENIUS is Σ_i Σ_{m>j} σ²_{i,m} / ‖W‖²_F
    and NUCLEAR the same with σ to the first power. SCHATTEN, (Σ_i Σ_{m>j} σ⁴_{i,m} / Σ_m σ_m(W)⁴)^¼, lies
    between them: as the Schatten 4-norm lies between the Frobenius (2) and the spectral norm (∞).

    Two need calibration inputs x. ACTIVATION is E‖(W − Ŵ) x‖² / E‖W x‖². OUTPUT is the same error as it
    shows at the model's outputs, predicted from what a few options of every layer do to them.
    """

    SPECTRAL = "spectral"
    SPECTRAL_BOUND = "spectral-bound"
    FROBENIUS = "frobenius"
    NUCLEAR = "nuclear"
    SCHATTEN = "schatten"
    ACTIVATION = "activation"
    OUTPUT = "output"

    @property
    def of_weights(self) -> bool:
        """Whether it follows from the weights alone."""
        return self not in (Measure.ACTIVATION, Measure.OUTPUT)


class Fit(StrEnum):
    """What factors are fitted to: the weight itself, or what it makes of calibration inputs."""

    WEIGHTS = "weights"
    ACTIVATIONS = "activations"


class Aggregate(StrEnum):
    """How the errors of all layers become the number that a plan minimizes."""

    MAX = "max"
    SUM = "sum"
    UNIFORM = "uniform"


class Budget(StrEnum):
    """What `--ratio` counts."""

    PARAMS = "params"
    MACS = "macs"
    LATENCY = "latency"


@dataclass(frozen=True, slots=True)
class Positions:
    """Where one use of a layer is evaluated.

    Attributes:
        batch: How often the operator is applied beside its spatial positions: the batch size for a
            convolution, the number of input rows for Gemm, MatMul and Gather.
        inputs: Input size of every spatial axis; empty for matrices.
        outputs: Output size of every spatial axis; empty for matrices.
    """

    batch: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """A BatchNormalization behind a layer, which goes into its factors when the layer is rewritten.

    Attributes:
        node: Its index in the scope of the layer's node.
        scale: What it multiplies every output feature of the weight by, shape (f,).
        bias: The bias of the layer with the BatchNorm folded in, shape (f,).
    """

    node: int
    scale: NDArray[np.float64]
    bias: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Use:
    """One node that applies a layer's weight.

    Attributes:
        scope: Path of the graph or function that holds the node; "" is the main graph.
        node: Index of the node in that scope.
        name: The node's name, as reports show it.
        op: Its operator type.
        operand: Index of the input that is the weight.
        transposed: The node applies the transpose of the layer's matrix (tied embeddings).
        rank: Number of axes of the activation that the weight meets; None where it is unknown.
        pointwise: The node maps every position by itself, and all of them (`graph.chains.is_pointwise`).
        positions: Where it is evaluated; None where a dimension is unknown.
    """

    scope: str
    node: int
    name: str
    op: str
    operand: int
    transposed: bool = False
    rank: int | None = None
    pointwise: bool = False
    positions: Positions | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One constant weight together with all the nodes that apply it.

    The weight's canonical form, on which all mathematics works, is an array of shape
    (groups, f / groups, c / groups, *kernel): output features by input channels, per group of the
    operator; kernel is () for Gemm, MatMul and Gather.

    Attributes:
        id: Scope path and weight name; unique in a model.
        op: Operator type of the first use.
        f: Output features, over all groups.
        c: Input channels, over all groups.
        kernel: Spatial kernel.
        groups: The operator's own groups (batch entries of a batched MatMul weight).
        dtype: Name of the dtype in which the weight is stored.
        folds: The folds that its operators allow and that differ from each other, in tie order.
        slices: The group counts k that its operators allow: divisors of c / groups, ascending.
        uses: The nodes that apply it, in graph order.
        batchnorm: The BatchNorm to fold when the layer is rewritten.
        freed: Parameters beside the weight that vanish when it is rewritten (BatchNorm, old bias).
        added: Parameters that a rewrite adds beside the factors (a new bias).
    """

    id: str
    op: str
    f: int
    c: int
    kernel: tuple[int, ...]
    groups: int
    dtype: str
    folds: tuple[Fold, ...]
    slices: tuple[int, ...]
    uses: tuple[Use, ...]
    batchnorm: BatchNorm | None = None
    freed: int = 0
    added: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canonical weight: (groups, f / groups, c / groups, *kernel)."""
        return (self.groups, self.f // self.groups, self.c // self.groups, *self.kernel)

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return prod(self.shape)

    def lowerings(self, k: int) -> tuple[Lowering, ...]:
        """The ways in which chains of k slices can be written."""
        if self.kernel:
            is_pointwise = k == self.groups == 1 and all(use.pointwise for use in self.uses)
            return (Lowering.NATIVE, Lowering.MATMUL) if is_pointwise else (Lowering.NATIVE,)
        is_matrix = all(
            use.op in ("Gemm", "MatMul") and use.operand == 1 and use.rank in (2, 3) for use in self.uses
        )
        return (Lowering.NATIVE, Lowering.CONV) if is_matrix and k > 1 else (Lowering.NATIVE,)

    def matrix(self, fold: Fold, k: int) -> tuple[int, int]:
        """Rows and columns of one slice's folded matrix."""
        encoder, decoder = fold.kernels(self.kernel)
        _, f, c, *_ = self.shape
        return f * prod(decoder), c // k * prod(encoder)

    def full_rank(self, fold: Fold, k: int) -> int:
        """The rank at which every slice is exact."""
        return min(self.matrix(fold, k))


@dataclass(frozen=True, slots=True)
class ScopeWork:
    """The MACs of one graph or function beside its layers', and where it belongs.

    Attributes:
        path: The scope's path.
        parent: The scope around it; None for the main graph and for functions.
        branch_of: Index in the parent of the If of which it is a branch; None for other bodies.
        macs: MACs of its nodes that are not layers; None where a dimension is unknown.
        calls: The paths of the functions that its nodes call, one entry per call.
        unknown: What to call the first of these nodes with an unknown dimension; empty if none has.
    """

    path: str
    parent: str | None
    branch_of: int | None
    macs: int | None
    calls: tuple[str, ...] = ()
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An operator that is left alone, and why; the reason says what to do about it."""

    scope: str
    name: str
    op: str
    weight: str
    reason: str


Spectra = Mapping[tuple[Fold, int], NDArray[np.float64]]
"""Singular values of every slice, descending, for each (fold, k): shape (groups, k, full rank)."""


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of vectors, for every operator group on its own.

    Attributes:
        count: Number of vectors.
        mean: Their mean, shape (g, n).
        second: Their centred second moments, E[(x − E x)(x − E x)ᵀ], shape (g, n, n).
    """

    count: int
    mean: NDArray[np.float64]
    second: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Targets:
    """What a layer should give, beside the moments of the inputs x that it gets.

    Attributes:
        mean: E[y], shape (g, f / g).
        cross: E[(y − E y)(x − E x)ᵀ], shape (g, f / g, p).
        power: E‖y − E y‖², shape (g,).
    """

    mean: NDArray[np.float64]
    cross: NDArray[np.float64]
    power: NDArray[np.float64]


class Lowering(StrEnum):
    """By which operators a chain is written; all compute the same.

    NATIVE is the layer's own: Conv for convolutions, MatMul for matrices, a batched one for slices. CONV
    writes the slices of a matrix as a grouped Conv, MATMUL a convolution with a kernel of size 1 as matrices.
    """

    NATIVE = "native"
    CONV = "conv"
    MATMUL = "matmul"


@dataclass(frozen=True, slots=True, order=True)
class Option:
    """One way to decompose a layer: fold, number of slices k, rank j of every slice, and its operators."""

    fold: Fold
    k: int
    j: int
    lowering: Lowering = Lowering.NATIVE


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
        measure: What the errors are.
        ratio: The ratio asked for.
        budget: What the ratio counts.
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
    measure: Measure
    ratio: float
    budget: Budget
    choices: tuple[Choice, ...]
    solver: Solver | None = None
    digest: str = ""
    factors: Fit = Fit.WEIGHTS
    recover: bool = False
    merge: bool = True


@dataclass(frozen=True, slots=True)
class Factors:
    """The two arrays that replace one weight.

    Attributes:
        fold: The fold by which they were made.
        encoder: Shape (groups, k, j, c / (groups · k), *encoder kernel).
        decoder: Shape (groups, f / groups, k, j, *decoder kernel).
    """

    fold: Fold
    encoder: Array
    decoder: Array

    @property
    def size(self) -> int:
        """Number of parameters of both."""
        return int(prod(self.encoder.shape) + prod(self.decoder.shape))


@dataclass(frozen=True, slots=True)
class Certificate:
    """Norms of the residual W − Ŵ relative to W's, for every operator group, rounded outwards.

    W has its BatchNorm folded in and is the map from patch to output (the encode matrix).
    """

    spectral: tuple[float, ...]
    frobenius: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far one output of the compressed model lies from the input model's, on the same inputs.

    Elements that are NaN or Inf in the input model's output are left out.

    Attributes:
        name: The output; "layer ID" where layers ran alone; elements of sequences as "name[0]".
        relative: ‖y − ŷ‖₂ / ‖y‖₂ in float64: 0 where both are zero, Inf where only y is or where the shapes
            differ. None for strings, and where there is no element to compare.
        largest: Largest |y − ŷ|. None where the relative error is, and where the shapes differ.
        agreement: For floats whose last axis looks like classes (two axes or more, the last of at least
            two elements): share of rows with the same largest element. For integers, booleans and
            strings: share of equal elements. None elsewhere.
        note: What else there is to know, a sentence; mostly empty.
        centred: ‖y − ŷ‖₂ / ‖y − ȳ‖₂, ȳ the mean over the samples: the relative error that a constant offset
            does not flatter. None for integers, booleans and strings, for one sample, for samples of several
            shapes, and where y does not vary.
        is_exact: Whether it holds integers, booleans or strings, of which agreement tells and no norm.
    """

    name: str
    relative: float | None
    largest: float | None
    agreement: float | None
    note: str = ""
    centred: float | None = None
    is_exact: bool = False


def largest_error(outputs: Iterable[OutputError]) -> float | None:
    """The largest error of an output of floats, centred where that tells; None where there is none."""
    floats = (output for output in outputs if not output.is_exact)
    errors = (output.relative if output.centred is None else output.centred for output in floats)
    return max((error for error in errors if error is not None), default=None)


@dataclass(frozen=True, slots=True)
class Validation:
    """What came out when the compressed model ran on the same inputs as the input model.

    Attributes:
        engine: What ran them.
        inputs: Where the inputs came from, with their dtypes and shapes.
        outputs: One per output; none where the model ran nowhere.
        never_ran: The rewritten layers which never ran (an If's other branch); None where unknown.
        notes: What the user should know: a model that the checker or the runtime does not accept.
        alone: One per rewritten layer, run alone, where the model ran nowhere.
    """

    engine: str
    inputs: str
    outputs: tuple[OutputError, ...]
    never_ran: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    alone: tuple[OutputError, ...] = ()

    @property
    def worst(self) -> float | None:
        """The largest relative error over the outputs; None where none was measured."""
        return max((output.relative for output in self.outputs if output.relative is not None), default=None)


@dataclass(frozen=True, slots=True)
class Trial:
    """A plan that was tried, and what its model gives on the held-out calibration inputs.

    Attributes:
        recipe: Name of the recipe.
        ratio: The ratio that was asked for.
        recovered: Whether its layers were recovered from the errors of those before them.
        outputs: One per output of the model; none where the recipe does not reach the ratio.
        chosen: Whether its model was taken.
        note: Why there are no outputs, a sentence.
    """

    recipe: str
    ratio: float
    recovered: bool = False
    outputs: tuple[OutputError, ...] = ()
    chosen: bool = False
    note: str = ""

    @property
    def error(self) -> float | None:
        """The `largest_error` of the outputs."""
        return largest_error(self.outputs)

    @property
    def agreement(self) -> float | None:
        """The least agreement over the outputs; None where none has one."""
        return min(
            (output.agreement for output in self.outputs if output.agreement is not None), default=None
        )


@dataclass(frozen=True, slots=True)
class LayerTime:
    """How long a rewritten layer takes alone, all uses together, in nanoseconds.

    Attributes:
        before: As it was.
        predicted: Its chain, as the plan reckoned that it takes in the model; None where a plan was replayed.
        after: Its chain, measured for its own rank.
    """

    before: int
    predicted: int | None
    after: int


_STEADY = 1.3


@dataclass(frozen=True, slots=True)
class Timing:
    """How long the whole model takes, in nanoseconds: medians of interleaved runs.

    Attributes:
        engine: What ran it, with how many threads.
        inputs: On which inputs, with their dtypes and shapes.
        before: The input model.
        predicted: The compressed model, as its plan's model with random factors was measured, or as the plan
            reckoned where that was not; None where a plan was replayed.
        after: The compressed model; None in a dry run.
        layers: The rewritten layers, by id; none in a dry run.
        spread: The longest time of the input model over the shortest, of all medians that were measured.
    """

    engine: str
    inputs: str
    before: int
    predicted: int | None
    after: int | None = None
    layers: Mapping[str, LayerTime] = field(default_factory=dict)
    spread: float = 1.0

    @property
    def ratio(self) -> float | None:
        """The compressed model's time over the input model's; None in a dry run."""
        return None if self.after is None else self.after / self.before

    @property
    def is_steady(self) -> bool:
        """Whether no other work on the machine has disturbed the times."""
        return self.spread <= _STEADY


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What calibration inputs were used for.

    Attributes:
        source: Where they came from, a short phrase.
        samples: How many were used.
        held: How many of them were held out.
        unmeasured: The layers of which they tell nothing, each with the reason, a sentence.
        warnings: What the user should know about them, sentences.
    """

    source: str
    samples: int
    held: int
    unmeasured: tuple[tuple[str, str], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LayerFit:
    """How the factors of one layer came about.

    Attributes:
        fit: What they were fitted to.
        recovered: Whether that was what the compressed layers before it give.
        error: ‖y − ŷ‖² / ‖y‖² of its output y on held-out calibration inputs where there are any, else on
            those that were fitted to; y less its mean where a bias keeps that. A recovered layer's y makes
            up for the layers before it, and ŷ is computed behind them. None where it is unknown.
    """

    fit: Fit
    recovered: bool = False
    error: float | None = None
