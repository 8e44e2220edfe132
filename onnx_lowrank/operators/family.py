"""The base class of operator families: everything needed to decompose the weight of an operator.

An operator family is one class in one module of this package; `registry` finds it there. All other parts
of the program ask the class and name no operator themselves.

All methods rest on one identity. With W the canonical weight, shape (g, f / g, c / g, *kernel), and x a
vector that the node reads, group i of its result is W[i].reshape(f / g, p) @ x[i] plus a bias.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from numpy.typing import NDArray
from onnx import NodeProto, TensorProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.geometry import Geometry

Kind = Literal["kernel", "matrix"]
"""Kinds of linear maps; two maps of the same kind have a product."""

Shape = tuple[int | None, ...]
"""A shape; unknown dimensions are None."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Names of the tensors that a chain reads: its input, its two factors, its bias ("" for none).

    A new bias, other than the node's own, is added as it is, without a Gemm's beta. `rows` are of a sparse
    table: the place of every row among the kept rows, and these rows with a row of zeros behind them.
    `slices` are the parts of an encoder that has a node for each of them, in place of `encoder`.
    """

    value: str
    encoder: str
    decoder: str
    bias: str
    rows: tuple[str, str] | None = None
    slices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Site:
    """One use of a layer, for which a chain is written.

    Attributes:
        layer: The layer.
        use: The use.
        node: Its node.
        nodes: The nodes of all uses, in their order.
        option: The option of the factors.
        read: The names of its node's outputs that a node reads or a graph returns.
    """

    layer: Layer
    use: Use
    node: NodeProto
    nodes: Sequence[NodeProto]
    option: Option
    read: frozenset[str]


@dataclass(frozen=True, slots=True)
class Sample:
    """The smallest input on which a use can be compared with its chain.

    Attributes:
        operand: Index of the node's input.
        shape: Shape of the input.
        kind: ONNX element type of the input; None for the weight's type.
    """

    operand: int
    shape: tuple[int, ...]
    kind: int | None = None


class Operator(ABC):
    """One family of operators with a weight.

    Attributes:
        domain: Domain of its operators; "" is the default domain.
        types: Its operator types.
        operands: The inputs that can be the weight, in the order in which they are tried.
        bias: Index of the input that adds one value per output feature; None if there is none.
        adds_behind: Whether an Add behind the node counts as its bias.
        reads_indices: Whether its activation holds indices of rows, which have no moments.
        is_linear: Whether its result is the product, plus a bias, and nothing more. Only then can the result
            be measured, compared and replaced on its own.
        multiplies_first: Whether an operator that is not linear multiplies its activation by the weight and
            adds the bias before it does anything else. Then recovery aims at the product inside.
        transposable: Whether another use may apply the transpose of the same matrix.
        product: The kind of neighbours with which it has a product (`rewrite.merge`); None if it has none.
        surrounded: Whether it is timed between operators that lay their tensors out for it.
    """

    domain: ClassVar[str] = ""
    types: ClassVar[tuple[str, ...]]
    operands: ClassVar[tuple[int, ...]] = (1,)
    bias: ClassVar[int | None] = None
    adds_behind: ClassVar[bool] = False
    reads_indices: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True
    multiplies_first: ClassVar[bool] = False
    transposable: ClassVar[bool] = False
    product: ClassVar[Kind | None] = None
    surrounded: ClassVar[bool] = False

    # --- the weight -------------------------------------------------------------------------------

    def activation(self, operand: int) -> int:
        """Index of the input that meets the weight, given the index of the weight."""
        return 0

    def is_data(self, operand: int) -> bool:
        """Whether an input can be the activation."""
        return any(self.activation(weight) == operand for weight in self.operands)

    def transposes(self, node: NodeProto, operand: int) -> bool:
        """Whether the node transposes an operand's last two axes before it multiplies."""
        return False

    def on_right(self, operand: int) -> bool:
        """Whether the weight is on the right, so that it multiplies rows of the activation."""
        return True

    def unfit(self, node: NodeProto, opset: int) -> str | None:
        """The reason why no chain can replace a node, whatever its weight is; None if there is none."""
        return None

    def kind(self, node: NodeProto) -> str:
        """The kind of a use; all uses of one weight must have the same kind."""
        return str(node.op_type)

    @abstractmethod
    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """Bring an operand into the canonical form (g, f / g, c / g, *kernel), or return a reason why not."""

    @abstractmethod
    def laid_out(
        self, node: NodeProto, operand: int, canonical: NDArray[Any], shape: Sequence[int]
    ) -> NDArray[Any]:
        """Bring a canonical weight into the layout that the node reads: the inverse of `canonical`.

        Args:
            node: A node of the layer.
            operand: Index of the weight among its inputs.
            canonical: Shape (g, f / g, c / g, *kernel).
            shape: The operand's shape.
        """

    def needs_rank(self, laid_out: Sequence[int]) -> bool:
        """Whether a weight of this shape needs an activation of known rank above 1."""
        return False

    def holds_kernel_whole(self, node: NodeProto) -> bool:
        """Whether one of the two factors has to hold the whole kernel."""
        return False

    def can_slice(self, use: Use, laid_out: Sequence[int], opset: int) -> bool:
        """Whether a use can read its input channels in k > 1 slices."""
        return False

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """The lowerings with which the chain of a use can be written, for one slice or for several."""
        return (Lowering.NATIVE,)

    # --- its positions and their cost -------------------------------------------------------------

    def rank(self, entering: Shape | None) -> int | None:
        """Number of axes of the activation that meets the weight; None if it is unknown."""
        return None if entering is None else len(entering)

    def is_pointwise(self, node: NodeProto, kernel: Sequence[int]) -> bool:
        """Whether a node with a kernel maps each position by itself, and skips and adds none."""
        return False

    @abstractmethod
    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """The positions at which a node evaluates a weight of `features` outputs; None if unknown.

        Args:
            node: The node.
            operand: Index of the weight.
            entering: Shape of the activation.
            leaving: Shape of the first output.
            features: Output features over all groups.
        """

    @abstractmethod
    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """The number of products with the whole weight."""

    @abstractmethod
    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """The numbers of products with the encoder and with the decoder."""

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Multiply-accumulates of a node that is no layer; None if a dimension is unknown."""
        return 0

    def macs_beside(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Multiply-accumulates of a layer's node beside its weight's; None as in `macs_undecomposed`."""
        return 0

    # --- the bias ---------------------------------------------------------------------------------

    def folds_batchnorm(self, operand: int, opset: int) -> bool:
        """Whether a BatchNormalization behind the node can be folded into its weight and its bias."""
        return False

    def scale(self, node: NodeProto) -> float:
        """The factor of W x (a Gemm's alpha)."""
        return 1.0

    def bias_scale(self, node: NodeProto) -> float:
        """The factor of the bias (a Gemm's beta)."""
        return 1.0

    def feature_axis(self, use: Use) -> int | None:
        """The axis of the result along which a bias lies, counted from the end; None if it is unknown."""
        return -1

    def bias_shape(self, use: Use, laid_out: Sequence[int], features: int) -> tuple[int, ...]:
        """The shape in which a bias broadcasts over the node's result.

        Args:
            use: The use.
            laid_out: Shape of the weight in the node's layout.
            features: Number of output features, f.

        Raises:
            InputError: The rank of the activation is needed and unknown.
        """
        return (features,)

    def set_bias(self, node: NodeProto, name: str) -> None:
        """Set the bias of a node, in place, to a tensor that is added without a factor.

        Raises:
            ValueError: The node takes no bias.
        """
        if self.bias is None:
            raise ValueError(f"{node.op_type} takes no bias")
        while len(node.input) <= self.bias:
            node.input.append("")
        node.input[self.bias] = name

    # --- the chain --------------------------------------------------------------------------------

    @abstractmethod
    def layout(
        self,
        layer: Layer,
        nodes: Sequence[NodeProto],
        factors: Factors,
        lowering: Lowering,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Bring the factors into the layout that the chain of the first use reads.

        Args:
            layer: The layer.
            nodes: The nodes of its uses.
            factors: Its factors.
            lowering: The operators that apply them.
        """

    @abstractmethod
    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """Write the chain of one use; its last node takes the place of the node's result."""

    # --- its activations, and the node on its own --------------------------------------------------

    @abstractmethod
    def geometry(self, layer: Layer, use: Use, node: NodeProto) -> Geometry:
        """The elements of an activation that meet the weight together."""

    @abstractmethod
    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample | None:
        """The smallest input on which a use can be compared; None if the node does not run on its own."""

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """The shapes for timing a use on its own; None if they are unknown or the time says nothing."""
        return None


@dataclass(frozen=True, slots=True)
class Timed:
    """The shapes of a use on its own.

    Attributes:
        input_shape: Shape of the activation.
        weight_shape: Shape of the weight in the node's layout.
        others: Shapes of further inputs, by their index, without the activation and the weight.
    """

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    others: Mapping[int, tuple[int, ...]]


def dims(tensor: TensorProto) -> tuple[int, ...]:
    """The shape of a stored tensor."""
    return tuple(tensor.dims)


def known(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape if every dimension is known, else None."""
    sizes = tuple(n for n in shape if n is not None) if shape is not None else ()
    return sizes if shape is not None and len(sizes) == len(shape) else None
