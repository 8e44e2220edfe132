"""Operators that first add to the result of the node before them: a residual, a bias, or both.

ONNX Runtime's optimizers fuse Adds into such operators; the addends keep their meaning there.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnx import NodeProto

from onnx_lowrank.graph.walk import is_op

_MICROSOFT = {
    "BiasGelu": ((0,), 1),
    "FastGelu": ((0,), 1),
    "SkipLayerNormalization": ((0, 1), 4),
    "SkipSimplifiedLayerNormalization": ((0, 1), 3),
}
"""The operands that are added up, and the operand of the bias, which may be absent."""


@dataclass(frozen=True, slots=True)
class Addends:
    """What a node adds to one of its operands before it computes anything else.

    Attributes:
        other: The operand that it adds, a residual or a constant; None if there is none.
        bias: The operand of a bias in one axis; None if the operator has none.
    """

    other: int | None
    bias: int | None


def addends(node: NodeProto, operand: int) -> Addends | None:
    """What a node adds to one of its operands; None if it does something else first."""
    if is_op(node, ("Add",)):
        return Addends(1 - operand, None)
    if node.domain != "com.microsoft" or node.op_type not in _MICROSOFT:
        return None
    summed, bias = _MICROSOFT[node.op_type]
    if operand not in summed:
        return None
    return Addends(next((n for n in summed if n != operand), None), bias)
