"""FusedMatMul, FusedGemm and FusedConv, into which ONNX Runtime's optimizer fuses the neighbouring nodes.

Their chains end with the fused operator, which keeps the scale and the activation function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.layer import Use
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.convolution import Conv, Convolution
from onnx_lowrank.operators.family import Operands, Shape, Site
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.matrix import Gemm, MatMul

_DOMAIN = "com.microsoft"


def _without(node: NodeProto, *names: str) -> NodeProto:
    """A copy of a node without some attributes."""
    copy = NodeProto()
    copy.CopyFrom(node)
    kept = [attribute for attribute in node.attribute if attribute.name not in names]
    del copy.attribute[:]
    copy.attribute.extend(kept)
    return copy


class FusedMatMul(MatMul):
    """MatMul with a scale (alpha) and transposed operands."""

    domain = _DOMAIN
    types = ("FusedMatMul",)
    product = None

    def transposes(self, node: NodeProto, operand: int) -> bool:
        """The value of transA or transB."""
        return bool(attribute_of(node, "transB" if operand else "transA", 0))

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """One matrix with its outputs first."""
        if weight.ndim > 2 or attribute_of(node, "transBatchA", 0) or attribute_of(node, "transBatchB", 0):
            return "it multiplies a batch of matrices: compress the model before that optimization"
        return super().canonical(node, operand, weight)

    def rank(self, entering: Shape | None) -> int | None:
        """Number of axes of the activation."""
        return None if entering is None else len(entering)

    def can_slice(self, use: Use, laid_out: Sequence[int], opset: int) -> bool:
        """Never: its chain has one slice."""
        return False

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """Only the native one."""
        return (Lowering.NATIVE,)

    def scale(self, node: NodeProto) -> float:
        """Its alpha."""
        return float(attribute_of(node, "alpha", 1.0))

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """Both factors are FusedMatMul: the first transposes the activation, the second scales."""
        operand, node = site.use.operand, site.node
        first, second = self.stored_factors(fragment, site, names)
        # The factors are stored as a plain MatMul reads them, so neither node may transpose them.
        weight = "transB" if operand else "transA"
        activation = "transA" if operand else "transB"
        hidden = fragment.copy(
            "encoder", _without(node, weight, "alpha"), {1 - operand: names.value, operand: first}
        )
        fragment.copy("decoder", _without(node, weight, activation), {1 - operand: hidden, operand: second})


class FusedGemm(Gemm):
    """Gemm with an activation function behind it."""

    domain = _DOMAIN
    types = ("FusedGemm",)
    product = None
    is_linear = False
    multiplies_first = True

    def folds_batchnorm(self, operand: int, opset: int) -> bool:
        """Its activation function stands between."""
        return False

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """Its second factor stays fused."""
        ways = super().lowerings(use, kernel, groups, sliced=sliced)
        return tuple(way for way in ways if way is not Lowering.POINTWISE)

    def _last(self, fragment: Fragment, site: Site, pair: list[str], bias: str) -> None:
        node = site.node
        dropped = ("transA", "transB", *(["beta"] if bias and bias not in node.input else []))
        inputs = dict(enumerate(pair)) | ({2: bias} if bias else {})
        fragment.copy("decoder", _without(node, *dropped), inputs)


class FusedConv(Conv):
    """Conv with an addend (its operand Z) and an activation function behind it."""

    domain = _DOMAIN
    types = ("FusedConv",)
    product = None
    is_linear = False
    multiplies_first = True

    def folds_batchnorm(self, operand: int, opset: int) -> bool:
        """Its activation function stands between."""
        return False

    def is_pointwise(self, node: NodeProto, kernel: Sequence[int]) -> bool:
        """Never: it also adds Z and applies the activation function."""
        return False

    def lowerings(
        self, use: Use, kernel: tuple[int, ...], groups: int, *, sliced: bool
    ) -> tuple[Lowering, ...]:
        """As a convolution, but never as a matrix."""
        return Convolution.lowerings(self, use, kernel, groups, sliced=sliced)

    def _last(
        self, fragment: Fragment, site: Site, op: str, inputs: list[str], geometry: dict[str, Any]
    ) -> None:
        """The fused node with the geometry of the second factor."""
        shaped = ("kernel_shape", "strides", "dilations", "pads", "auto_pad", "group")
        fragment.copy("decoder", _without(site.node, *shaped), dict(enumerate(inputs)))
        fragment.set_attributes(geometry)
