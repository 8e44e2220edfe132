"""Operators that compute every element of an activation by itself."""

from __future__ import annotations

from onnx import NodeProto

from onnx_lowrank.graph.walk import is_op

_DEFAULT = frozenset(
    {
        *(
            "Abs",
            "Add",
            "Cast",
            "Celu",
            "Clip",
            "Cos",
            "Div",
            "Dropout",
            "Elu",
            "Erf",
            "Exp",
        ),
        *(
            "Gelu",
            "HardSigmoid",
            "HardSwish",
            "Identity",
            "LeakyRelu",
            "Log",
            "Max",
            "Min",
            "Mish",
            "Mul",
            "Neg",
        ),
        *(
            "PRelu",
            "Pow",
            "Reciprocal",
            "Relu",
            "Selu",
            "Sigmoid",
            "Sin",
            "Softplus",
            "Softsign",
            "Sqrt",
            "Sub",
        ),
        *("Sum", "Swish", "Tanh", "ThresholdedRelu"),
    }
)
_MICROSOFT = frozenset({"BiasGelu", "FastGelu", "Gelu", "QuickGelu"})


def is_elementwise(node: NodeProto) -> bool:
    """Whether each element of a node's only output depends on the inputs' elements in its place alone."""
    if sum(bool(name) for name in node.output) != 1:
        return False
    return is_op(node, _DEFAULT) or (node.domain == "com.microsoft" and node.op_type in _MICROSOFT)
