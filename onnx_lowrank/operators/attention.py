"""com.microsoft Attention: three projections with one weight, then the attention.

Its weight is (c, q + k + v). The chain is one encoder (c, j), shared by the three projections, and Attention
with the narrower weight (j, q + k + v). The operator allows this: its input need not be as wide as its heads.
Its heads get smaller as those of other packed matrices do (`layers.attention`).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from numpy.typing import NDArray
from onnx import NodeProto

from onnx_lowrank.core.factors import Factors
from onnx_lowrank.core.layer import Layer, Positions, Use
from onnx_lowrank.core.option import Fold, Lowering
from onnx_lowrank.graph.walk import attribute_of
from onnx_lowrank.operators.family import Operands, Operator, Sample, Shape, Site, Timed, known
from onnx_lowrank.operators.fragment import Fragment
from onnx_lowrank.operators.geometry import Vectors

_PAST = 4
"""Index of the input that holds earlier keys and values."""

_TOKENS = 3
"""Number of tokens in a sample."""


def widths_of(node: NodeProto, features: int) -> tuple[int, ...] | None:
    """The sizes of the queries, the keys and the values of an Attention; None if they do not fit.

    Args:
        node: The node.
        features: The features of its weight.
    """
    widths = tuple(attribute_of(node, "qkv_hidden_sizes", [])) or (features // 3,) * 3
    return widths if len(widths) == 3 and min(widths) > 0 and sum(widths) == features else None


class Attention(Operator):
    """Attention of ONNX Runtime's transformer optimizer."""

    domain = "com.microsoft"
    types = ("Attention",)
    bias = 2
    is_linear = False
    multiplies_first = True

    def canonical(self, node: NodeProto, operand: int, weight: NDArray[Any]) -> NDArray[Any] | str:
        """One matrix with its outputs first."""
        if weight.ndim != 2:
            return "its weight is no matrix: repair the export"
        return weight.T[None]

    def laid_out(
        self, node: NodeProto, operand: int, canonical: NDArray[Any], shape: Sequence[int]
    ) -> NDArray[Any]:
        """The matrix with its inputs first."""
        return canonical.swapaxes(1, 2).reshape(shape)

    def positions(
        self, node: NodeProto, operand: int, entering: Shape | None, leaving: Shape | None, features: int
    ) -> Positions | None:
        """The batch and the number of tokens."""
        shape = known(entering)
        return None if shape is None or len(shape) != 3 else Positions(shape[0], shape[1:2], shape[1:2])

    def dense_evaluations(self, node: NodeProto, positions: Positions) -> int:
        """Once per token."""
        return positions.batch * (positions.inputs[0] if positions.inputs else 1)

    def factor_evaluations(
        self, node: NodeProto, positions: Positions, kernel: tuple[int, ...], fold: Fold, *, transposed: bool
    ) -> tuple[int, int]:
        """Once per token."""
        tokens = self.dense_evaluations(node, positions)
        return tokens, tokens

    def macs_beside(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Those of the queries with the keys, and of the shares with the values."""
        tokens, weight = known(inputs[0]), known(inputs[1])
        widths = widths_of(node, weight[-1]) if weight else None
        past = known(inputs[_PAST]) if any(node.input[_PAST : _PAST + 1]) else (2, 1, 1, 0, 1)
        if tokens is None or widths is None or past is None or (len(tokens), len(past)) != (3, 5):
            return None
        batch, new, _ = tokens
        return batch * new * (new + past[3]) * (widths[0] + widths[2])

    def macs_undecomposed(
        self, node: NodeProto, inputs: Sequence[Shape | None], leaving: Shape | None
    ) -> int | None:
        """Those of the three projections, too."""
        tokens, weight = known(inputs[0]), known(inputs[1])
        beside = self.macs_beside(node, inputs, leaving)
        return (
            None
            if tokens is None or weight is None or beside is None
            else prod((*tokens, weight[-1])) + beside
        )

    def layout(
        self, layer: Layer, nodes: Sequence[NodeProto], factors: Factors, lowering: Lowering
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Matrices with the inputs first."""
        return factors.encoder[0, 0].T, factors.decoder[0, :, 0].T

    def chain(self, fragment: Fragment, site: Site, names: Operands) -> None:
        """MatMul, then Attention with the narrower weight."""
        hidden = fragment.add("encoder", "MatMul", [names.value, names.encoder])
        inputs = {0: hidden, 1: names.decoder} | ({2: names.bias} if names.bias else {})
        fragment.copy("decoder", site.node, inputs)

    def geometry(self, layer: Layer, use: Use, node: NodeProto) -> Vectors:
        """The tokens."""
        return Vectors()

    def sample(self, layer: Layer, use: Use, node: NodeProto) -> Sample | None:
        """A few tokens; None if the node has further inputs (a mask, a past), which may be computed."""
        return None if any(node.input[3:]) else Sample(0, (1, _TOKENS, layer.c))

    def timed(self, layer: Layer, use: Use, node: NodeProto) -> Timed | None:
        """As many tokens as in the model, without the cheap mask; None with a past, which changes shapes."""
        if use.positions is None or (len(node.input) > 4 and node.input[4]):
            return None
        shape = (use.positions.batch, *use.positions.inputs, layer.c)
        return Timed(shape, use.laid_out, {2: (layer.f,)} if len(node.input) > 2 and node.input[2] else {})
