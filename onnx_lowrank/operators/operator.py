"""What has to be known of an operator so that its weight can be decomposed.

An operator family is one class in one module of this package; `registry` finds it there. Every other part
of the program asks the class, and names no operator itself.

The identity behind all methods: with W the canonical weight, shape (g, f / g, c / g, *kernel), and x a
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
"""Kinds of linear maps: those of one kind multiply."""

Shape = tuple[int | None, ...]
"""A shape whose unknown dimensions are None."""


@dataclass(frozen=True, slots=True)
class Operands:
    """Names of the tensors that a chain reads: its input, its two factors, its bias ("" for none).

    A bias other than the node's own is added as it is, without a Gemm's beta.
    """

    value: str
    encoder: str
    decoder: str
    bias: str


@dataclass(frozen=True, slots=True)
class Site:
    """One use of a layer, at the moment when its chain is written.

    Attributes:
        layer: The layer.
        use: The use.
        node: Its node.
        nodes: The nodes of all uses, in their order.
        option: The option of the factors.
    """

    layer: Layer
    use: Use
    node: NodeProto
    nodes: Sequence[NodeProto]
    option: Option


@dataclass(frozen=True, slots=True)
class Sample:
    """The smallest input that shows what a use does.

    Attributes:
        operand: Index of the node's input.
        shape: Its shape.
        kind: Its ONNX element type; None for the weight's.
    """

    operand: int
    shape: tuple[int, ...]
    kind: int | None = None


class Operator(ABC):
    """One family of operators with a weight.

    Attributes:
        domain: Domain of its operators; "" is the default one.
        types: Its operator types.
        operands: The inputs that can be the weight, in the order in which they are tried.
        bias: The input that adds one value per output feature; None where there is none.
        adds_behind: Whether an Add behind the node counts as its bias.
        reads_indices: Whether its activation holds indices of rows, which have no moments.
        is_linear: Whether the node gives the product (and a bias): only then its result can be measured,
            compared and replaced on its own.
        transposable: Whether another use may apply the transpose of the same matrix.
        product: How it multiplies with a neighbour of the same kind (`rewrite.merge`); None where it cannot.
        surrounded: Whether it is timed between operators that lay their tensors out for it.
    """

    domain: ClassVar[str] = ""
    types: ClassVar[tuple[str, ...]]
    operands: ClassVar[tuple[int, ...]] = (1,)
    bias: ClassVar[int | None] = None
    adds_behind: ClassVar[bool] = False
    reads_indices: ClassVar[bool] = False
    is_linear: ClassVar[bool] = True
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
        """Whether a matrix has its input features first, so that rows of the activation meet it."""
        return True

    def kind(self, node: NodeProto) -> str:
        """Uses of one weight have to be of one kind."""
        return str(node.op_type)

    @abstractmethod
    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """Bring an operand into the canonical form (g, f / g, c / g, *kernel), or say why it has none."""

    @abstractmethod
    def laid_out(
        self, node: NodeProto, operand: int, canonical: NDArray[Any], shape: Sequence[int]
    ) -> NDArray[Any]:
        """Lay a canonical weight out as the node reads it: the inverse of `canonical`.

        Args:
            node: A node of the layer.
            operand: Index of its input that is the weight.
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
        """The ways in which the chain of a use can be written, for one slice or for several."""
        return (Lowering.NATIVE,)

    # --- where it is evaluated, and what that costs -----------------------------------------------

    def rank(self, entering: Shape | None) -> int | None:
        """Number of axes of the activation that meets the weight; None where it is unknown."""
        return None if entering is None else len(entering)

    def is_pointwise(self, node: NodeProto, kernel: Sequence[int]) -> bool:
        """Whether a node with a kernel maps every position by itself, and all of them."""
        return False

    @abstractmethod
    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """Where a node with a weight of `features` outputs is evaluated; None where that is unknown.

        Args:
            node: The node.
            operand: Index of the weight.
            entering: Shape of the activation.
            leaving: Shape of the first output.
            features: Output features over all groups.
        """

    @abstractmethod
    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """How often the whole weight is multiplied."""

    @abstractmethod
    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """How often the encoder and the decoder are multiplied."""

    def macs(self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None) -> int | None:
        """Multiply-accumulates of a node that is no layer; None where a dimension is unknown."""
        return 0

    def macs_beside(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Multiply-accumulates of a layer's node by other weights than the layer's; None as in `macs`."""
        return 0

    # --- the bias ---------------------------------------------------------------------------------

    def folds_batchnorm(self, operand: int, opset: int) -> bool:
        """Whether a BatchNormalization behind the node can go into its weight and its bias."""
        return False

    def scale(self, node: NodeProto) -> float:
        """What multiplies W x (a Gemm's alpha)."""
        return 1.0

    def bias_scale(self, node: NodeProto) -> float:
        """What multiplies the bias (a Gemm's beta)."""
        return 1.0

    def feature_axis(self, use: Use) -> int | None:
        """The axis along which a bias lies, counted from the end; None where it is unknown."""
        return -1

    def bias_shape(self, use: Use, laid_out: Sequence[int], features: int) -> tuple[int, ...]:
        """How a bias has to stand so that it spreads over what the node gives.

        Args:
            use: The node.
            laid_out: Shape of its weight as it reads it.
            features: Number of its output features, f.

        Raises:
            InputError: The rank of the activation is needed and unknown.
        """
        return (features,)

    def set_bias(self, node: NodeProto, name: str) -> None:
        """Have a node with a bias operand, which is changed, add a tensor as it is.

        Raises:
            ValueError: It takes no bias.
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
        """Lay the factors out as the nodes of the first use's chain read them.

        Args:
            layer: The layer.
            nodes: The nodes of its uses.
            factors: Its factors.
            lowering: By which operators they are applied.
        """

    @abstractmethod
    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """Write the chain of one use; its last node gives what the node gave."""

    # --- its activations, and the node on its own --------------------------------------------------

    @abstractmethod
    def geometry(self, layer: Layer, use: Use, node: NodeProto) -> Geometry:
        """Which elements of an activation meet the weight together."""

    @abstractmethod
    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample | None:
        """The smallest input that shows what a use does; None where the node does not run on its own."""

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """The tensors of a use on its own, to time it; None where they are unknown or it takes no time."""
        return None


@dataclass(frozen=True, slots=True)
class Timed:
    """A use on its own, without numbers.

    Attributes:
        input_shape: Shape of the activation.
        weight_shape: Shape of the weight as the node reads it.
        others: Dims of the other inputs that come along, by their index; the activation and the weight
            are not among them.
    """

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    others: Mapping[int, tuple[int, ...]]


def dims(tensor: TensorProto) -> tuple[int, ...]:
    """The shape of a stored tensor."""
    return tuple(tensor.dims)


def known(shape: Shape | None) -> tuple[int, ...] | None:
    """The shape where every dimension is known, else None."""
    sizes = tuple(n for n in shape if n is not None) if shape is not None else ()
    return sizes if shape is not None and len(sizes) == len(shape) else None
