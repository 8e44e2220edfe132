"""Layers, the nodes that apply them, and the other parts of a model; none of them an ONNX object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import ceil, prod

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.option import Fold, Lowering, Option

_SPARSENESS = 8
_SPARSE_RANKS = 32  # each takes an eigendecomposition


@dataclass(frozen=True, slots=True)
class Positions:
    """Where one use of a layer is evaluated.

    Attributes:
        batch: How often the operator is applied at each of its spatial positions: the batch size for a
            convolution or a sequence, the number of input rows for Gemm, MatMul and Gather.
        inputs: Input size of every spatial axis, or the number of steps of a sequence; empty for matrices.
        outputs: Output size of the same axes; empty for matrices.
    """

    batch: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Evaluations:
    """How often one use of a layer multiplies its weight, or the two factors in place of it.

    Attributes:
        dense: Number of multiplications by the whole weight.
        factors: Numbers of multiplications by the encoder and by the decoder, for every fold of the layer.
    """

    dense: int
    factors: Mapping[Fold, tuple[int, int]]


@dataclass(frozen=True, slots=True)
class BatchNorm:
    """A BatchNormalization behind a layer. Rewriting the layer folds it into the factors.

    Attributes:
        node: Its index in the scope of the layer's node.
        scale: Its factor for every output feature of the weight, shape (f,).
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
        laid_out: Shape of the weight as the node reads it.
        transposed: The node applies the transpose of the layer's matrix (tied embeddings).
        rank: Number of axes of the activation that is multiplied by the weight; None if it is unknown.
        pointwise: The node maps every position separately, and skips none.
        inputs_first: The node reads a matrix with its input features first.
        reads_indices: The node reads indices, which have no moments.
        is_linear: The node's result is the product plus a bias, so it can be measured and replaced.
        is_recovered: The node multiplies its activation first, so recovery can aim at the product inside.
        positions: Where it is evaluated; None if a dimension is unknown.
        evaluations: How often it multiplies; None if a dimension is unknown.
    """

    scope: str
    node: int
    name: str
    op: str
    operand: int
    laid_out: tuple[int, ...] = ()
    transposed: bool = False
    rank: int | None = None
    pointwise: bool = False
    inputs_first: bool = True
    reads_indices: bool = False
    is_linear: bool = True
    is_recovered: bool = True
    positions: Positions | None = None
    evaluations: Evaluations | None = None


class Between(StrEnum):
    """The numbers between layers that are narrowed together.

    CHANNELS: the partners compute the layer's input channels, each by itself, and some are dropped. VALUES:
    the partner computes the values of attention, whose result the layer reads, and every head gets smaller.
    SCORES: the layer computes the queries of attention and the partner the keys, and every head gets smaller.
    """

    CHANNELS = "channels"
    VALUES = "values"
    SCORES = "scores"


@dataclass(frozen=True, slots=True)
class Beside:
    """The costs beside the weights of layers that are narrowed together; all are proportional to the width.

    Attributes:
        stored: Parameters that the full width would take: of biases, BatchNorms, depthwise convolutions.
        owned: Parameters of the same kinds that go, since nothing else reads them.
        macs: MACs of the operators between the layers at full width; None if a dimension is unknown.
        has_convolutions: Whether depthwise convolutions are among these operators.
    """

    stored: int = 0
    owned: int = 0
    macs: int | None = 0
    has_convolutions: bool = False


@dataclass(frozen=True, slots=True)
class Rows:
    """Neighbouring output features of a packed matrix, which computes several of queries, keys and values.

    Attributes:
        start: The first of them.
        size: Their number.
    """

    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Narrowing:
    """The layers that are narrowed together with a layer, without a new operator.

    Attributes:
        between: The numbers between them.
        partners: The other layers, each of which loses output features.
        heads: The number of heads into which the layer's width is cut; widths are multiples of it.
        beside: The costs beside the layers' own weights.
        rows: The features of a packed matrix that get fewer: those of the one partner, or if there is none,
            the layer's own queries and keys. Empty if whole matrices get narrower.
        bound: Id of the layer whose narrowing goes with this one, with as many numbers in a head, since the
            graph states one size of heads for both; "" if there is none.
    """

    between: Between
    partners: tuple[Layer, ...]
    heads: int = 1
    beside: Beside = Beside()
    rows: tuple[Rows, ...] = ()
    bound: str = ""


@dataclass(frozen=True, slots=True)
class Layer:
    """One constant weight together with all the nodes that apply it.

    All mathematics works on the weight's canonical form, an array of shape
    (groups, f / groups, c / groups, *kernel): output features by input channels, per group of the
    operator. Only convolutions have a kernel; it is () for the other operators.

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
        freed: Parameters, without the weight's, that rewriting removes (BatchNorm, old bias).
        added: Parameters, without the factors', that rewriting adds (a new bias).
        whole: The ways in which a chain of one slice can be written.
        sliced: The ways in which a chain of several slices can be written.
        narrowing: The layers that can be narrowed together with this one; None if there are none.
        siblings: Ids of the layers that read the same tensor in the same way, this one included, in graph
            order. They can share an encoder. Empty if there is no other.
        addends: Ids of the layers whose results are added up, this one included, in graph order. They can
            share a decoder. Empty if there is no other.
        summed_bias: Parameters, without the factors', that rewriting adds if the layers of its sum share a
            decoder: those of the sum of their biases, less the biases that go. The first layer has all.
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
    whole: tuple[Lowering, ...] = (Lowering.NATIVE,)
    sliced: tuple[Lowering, ...] = (Lowering.NATIVE,)
    narrowing: Narrowing | None = None
    siblings: tuple[str, ...] = ()
    addends: tuple[str, ...] = ()
    summed_bias: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the canonical weight: (groups, f / groups, c / groups, *kernel)."""
        return (self.groups, self.f // self.groups, self.c // self.groups, *self.kernel)

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return prod(self.shape)

    @property
    def narrow_fold(self) -> Fold:
        """The fold of the factors of a narrow layer: the decoder holds the kernel."""
        return Fold.DECODE.on(self.kernel)

    @property
    def shared_fold(self) -> Fold:
        """The fold of layers that share a factor: the encoder holds the whole kernel."""
        return Fold.ENCODE.on(self.kernel)

    def joinable(self, lowering: Lowering) -> tuple[str, ...]:
        """Ids of the layers that can share the factor of a lowering, this one included, in graph order."""
        match lowering:
            case Lowering.SHARED:
                return self.siblings
            case Lowering.SUMMED:
                return self.addends
            case _:
                return ()

    def holds_factor(self, option: Option) -> bool:
        """Whether a factor that layers share counts as this layer's; True if the option shares none."""
        match option.lowering:
            case Lowering.SHARED:
                return option.encoder == self.id
            case Lowering.SUMMED:
                return self.addends[:1] == (self.id,)
            case _:
                return True

    @property
    def partners(self) -> tuple[Layer, ...]:
        """The layers that are narrowed together with this one."""
        return () if self.narrowing is None else self.narrowing.partners

    @property
    def beside(self) -> Beside:
        """The costs beside the weights of the layers that are narrowed together."""
        return Beside() if self.narrowing is None else self.narrowing.beside

    @property
    def width(self) -> int:
        """The number of channels, or of features, that narrow options lower."""
        if self.narrowing is not None and self.packs_own:
            return self.narrowing.rows[0].size
        return self.f if self.loses_features else self.c

    @property
    def loses_features(self) -> bool:
        """Whether its narrow options lower its output features, and not its input channels."""
        return self.narrowing is not None and self.narrowing.between is Between.SCORES

    @property
    def packs_own(self) -> bool:
        """Whether its own matrix is packed, and narrow options lower its queries and keys."""
        return self.narrowing is not None and bool(self.narrowing.rows) and not self.narrowing.partners

    @property
    def width_step(self) -> int:
        """The number of which all widths are multiples."""
        return 1 if self.narrowing is None else self.narrowing.heads

    @property
    def kept_per_rank(self) -> int:
        """The number of rows that a sparse table keeps for each unit of rank; 0 if the layer cannot keep any.

        The kept rows take about an eighth of the numbers of the low-rank table. On both tables of
        passes/README.md, a share of about a tenth errs less than none, and at most 1.5 times as much as the
        best share.
        """
        is_table = bool(self.uses) and all(use.reads_indices and not use.transposed for use in self.uses)
        return self.c // (_SPARSENESS * self.f) if is_table else 0

    def sparse_step(self, block: int) -> int:
        """The step between the ranks of a sparse table.

        Args:
            block: The step between all ranks.
        """
        return block * ceil(self.f / (_SPARSE_RANKS * block))

    def at_width(self, width: int) -> tuple[Layer, ...]:
        """The partners and this layer, in this order, as they are at a width.

        A partner whose heads serve several heads of this layer has fewer features, in the same proportion.
        """
        # A narrow layer is written anew: its BatchNorm is folded, and its bias is the added one.
        if self.loses_features:
            f = self._fewer(self.f, width) if self.packs_own else width
            own = replace(self, f=f, freed=self.added * f // self.f)
        else:
            own = replace(self, c=width, freed=self.added)
        partners = (replace(layer, f=self._fewer(layer.f, width)) for layer in self.partners)
        return (*partners, own)

    def _fewer(self, features: int, width: int) -> int:
        """The features of a matrix that narrowing makes fewer, at a width."""
        rows = () if self.narrowing is None else self.narrowing.rows
        changed = sum(each.size for each in rows) or features
        return features - changed + changed * width // self.width

    def narrowed(self, width: int, cost: Callable[[Layer], int]) -> int:
        """The cost of the layer at a width, less the saving of its partners.

        Args:
            width: The width.
            cost: The cost of a kept layer.
        """
        *partners, own = self.at_width(width)
        saved = sum(cost(layer) - cost(less) for layer, less in zip(self.partners, partners, strict=True))
        return cost(own) - saved

    def lowerings(self, k: int) -> tuple[Lowering, ...]:
        """The ways in which chains of k slices can be written."""
        return self.whole if k == 1 else self.sliced

    def matrix(self, fold: Fold, k: int) -> tuple[int, int]:
        """Rows and columns of one slice's folded matrix."""
        encoder, decoder = fold.kernels(self.kernel)
        _, f, c, *_ = self.shape
        return f * prod(decoder), c // k * prod(encoder)

    def full_rank(self, fold: Fold, k: int) -> int:
        """The rank at which every slice is exact."""
        return min(self.matrix(fold, k))


def narrow_layers(options: Iterable[tuple[Layer, Option | None]]) -> dict[str, Layer]:
    """The layers that a plan leaves narrower, as they are then, by id.

    Args:
        options: Every layer with its option; None for a layer that the plan keeps.
    """
    narrow: dict[str, Layer] = {}
    for layer, option in options:
        if option is None or option.lowering is not Lowering.NARROW:
            continue
        for whole, less in zip((*layer.partners, layer), layer.at_width(option.j), strict=True):
            # Several narrowings may take features from one packed matrix.
            known = narrow.get(less.id, whole)
            narrow[less.id] = replace(less, f=known.f + less.f - whole.f)
    return narrow


def shared_full_rank(layers: Sequence[Layer], lowering: Lowering) -> int:
    """The rank at which a factor that layers share is exact for all of them.

    Args:
        layers: The layers.
        lowering: SHARED if they share an encoder, SUMMED if they share a decoder.
    """
    sizes = [layer.matrix(layer.shared_fold, 1) for layer in layers]
    rows, columns = sizes[0]
    if lowering is Lowering.SUMMED:
        return min(rows, sum(own for _, own in sizes))
    return min(columns, sum(own for own, _ in sizes))


def sharing(layer: Layer, options: Mapping[str, Option | None]) -> tuple[str, ...]:
    """The ids of the layers that share a factor with a layer in a plan, itself included, in graph order.

    Empty if none do.

    Args:
        layer: The layer.
        options: The options of the plan, by id.
    """
    own = options.get(layer.id)
    if own is None:
        return ()
    way = own.lowering, own.encoder
    chosen = ((name, options.get(name)) for name in layer.joinable(own.lowering))
    return tuple(name for name, option in chosen if option and (option.lowering, option.encoder) == way)


@dataclass(frozen=True, slots=True)
class ScopeWork:
    """The MACs of the nodes of one graph or function that belong to no layer, and its place in the model.

    Attributes:
        path: The scope's path.
        parent: The scope around it; None for the main graph and for functions.
        branch_of: If it is a branch of an If, the index of that If in the parent; None for other bodies.
        macs: MACs of its nodes, without those of layers' weights; None if a dimension is unknown.
        calls: The paths of the functions that its nodes call, one entry per call.
        unknown: Name for messages of the first node with an unknown dimension; empty if no node has one.
    """

    path: str
    parent: str | None
    branch_of: int | None
    macs: int | None
    calls: tuple[str, ...] = ()
    unknown: str = ""


@dataclass(frozen=True, slots=True)
class Skipped:
    """An operator that is left alone, and the reason, which also says what the user can do."""

    scope: str
    name: str
    op: str
    weight: str
    reason: str
